"""What holds for all tests."""

from hypothesis import HealthCheck, settings

# No example is too slow and no data too slow to draw: the machine may be a slow one, or a busy one.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
