"""Reading the settings: a flag of `warmkv serve` wins over the environment (`WARMKV_` and the setting's name in
capitals), which wins over the default.

What can be set, and the limits of each value, is declared in `contract/settings.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Any, get_type_hints

from pydantic import ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from warmkv_server.contract.settings import LOOPBACK, Settings
from warmkv_server.errors import OperatorError

_HINTS = get_type_hints(Settings, include_extras=True)
_TYPES = get_type_hints(Settings)


@dataclass(frozen=True)
class Option:
    """One setting, as an operator meets it.

    Attributes:
        default: "" if there is none, or if the help text says what it is.
    """

    name: str
    help: str
    default: str
    is_switch: bool

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def variable(self) -> str:
        return f"WARMKV_{self.name.upper()}"


def options() -> Iterator[Option]:
    """Every setting, in the order of its declaration."""
    for field in fields(Settings):
        is_told = field.default in (MISSING, None) or field.name in _of_this_machine()
        text = FieldInfo.from_annotation(_HINTS[field.name]).description or ""
        yield Option(field.name, text, "" if is_told else str(field.default), _TYPES[field.name] is bool)


def read(flags: dict[str, object]) -> Settings:
    """Settings from flags (those given), the environment and this machine.

    Raises:
        OperatorError: naming the first setting that is wrong.
    """
    try:
        found = _Sources(**flags)
    except ValidationError as error:
        first = error.errors()[0]
        (wrong,) = [option for option in options() if option.name == first["loc"][0]]
        message = first["msg"].removeprefix("Value error, ")
        raise OperatorError(
            f"{wrong.flag} ({wrong.variable}) can't be {first['input']!r}: {message[0].lower()}{message[1:]}"
        ) from None
    settings = Settings(**{field.name: getattr(found, field.name) for field in fields(Settings)})
    _check_together(settings)
    return settings


def _check_together(settings: Settings) -> None:
    """What no setting is wrong in by itself."""
    if (settings.tls_cert is None) != (settings.tls_key is None):
        raise OperatorError("--tls-cert and --tls-key need each other")
    if settings.kv is not None and settings.kv_bits is not None:
        raise OperatorError("--kv and --kv-bits both say how K and V are stored; give one of them")
    open_to_all = settings.tls_cert is None and settings.token_file is None
    if settings.host not in LOOPBACK and open_to_all and not settings.insecure_bind:
        raise OperatorError(
            f"--host {settings.host} would serve other machines with neither TLS nor tokens: "
            "give --tls-cert and --tls-key, or --token-file, or say --insecure-bind"
        )


def _of_this_machine() -> dict[str, Any]:
    """Defaults that follow from the machine."""
    quarter = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    return {"hot_bytes": quarter, "inflight_bytes": quarter}


class _Base(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="WARMKV_", extra="forbid")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, InitSettingsSource(settings_cls, _of_this_machine())


_FIELDS: dict[str, Any] = {field.name: (_HINTS[field.name], field.default) for field in fields(Settings)}
_Sources = create_model("_Sources", __base__=_Base, **_FIELDS)
"""`Settings`, as the library reads and checks them."""
