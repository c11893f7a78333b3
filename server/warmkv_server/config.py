"""Reading the settings: a flag of `warmkv serve` wins over the environment (`WARMKV_` and the setting's name in
capitals), which wins over a TOML file (`--config`), which wins over the default.

What can be set, and the limits of each value, is declared in `contract/settings.py`.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict

from warmkv_server.contract.settings import LOOPBACK, Duration, Settings
from warmkv_server.errors import OperatorError
from warmkv_server.platform import memory, places

FILE_VARIABLE = "WARMKV_CONFIG"
"""Names the file, where no flag does."""
_PREFIX = "WARMKV_"
_OTHER_VARIABLES = (FILE_VARIABLE, "WARMKV_BLAS", "WARMKV_TARGET", "WARMKV_TOKEN", "WARMKV_TLS_CA")
_KUBERNETES = re.compile(r"(\w+_)?SERVICE_(HOST|PORT)\w*|PORT_\d+_\w+")
"""What it sets beside a service that is called warmkv, behind the prefix."""
_LIKE = 0.75
"""How like a setting's name another has to be to be meant as one, 1 for the same. A variable that is less like one may
be somebody else's."""

_HINTS = get_type_hints(Settings, include_extras=True)
_TYPES = get_type_hints(Settings)


@dataclass(frozen=True)
class Option:
    """One setting, as an operator meets it.

    Attributes:
        default: "" if there is none, or if the help text says what it is.
        metavar: what stands for the value in a help text.
    """

    name: str
    help: str
    default: str
    is_switch: bool
    metavar: str

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def variable(self) -> str:
        return f"{_PREFIX}{self.name.upper()}"


@dataclass(frozen=True)
class Configured:
    """Settings, and who said so.

    Attributes:
        origins: of each setting by name, such as "--port" or "the default".
    """

    settings: Settings
    origins: Mapping[str, str]


def options() -> Iterator[Option]:
    """Every setting, in the order of its declaration."""
    for field in fields(Settings):
        is_told = field.default is None or field.name in {**_of_this_machine(), **_of_this_platform()}
        text = FieldInfo.from_annotation(_HINTS[field.name]).description or ""
        is_duration = get_args(_HINTS[field.name])[0] == (Duration | None)
        metavar = "DURATION" if is_duration else field.name.rpartition("_")[2].upper()
        yield Option(field.name, text, "" if is_told else str(field.default), _TYPES[field.name] is bool, metavar)


def read(flags: Mapping[str, object], file: Path | None = None) -> Settings:
    """Settings from flags (those given), the environment, the file and this machine.

    Raises:
        OperatorError: naming the first setting that is wrong.
    """
    return tell(flags, file).settings


def tell(flags: Mapping[str, object], file: Path | None = None) -> Configured:
    """As `read`, with where each value came from.

    Args:
        file: in TOML; None for the one that the environment names, if it names one.

    Raises:
        OperatorError
    """
    known = {option.name: option for option in options()}
    _refuse_misspelt(known)
    if file is None and os.environ.get(FILE_VARIABLE):
        file = Path(os.environ[FILE_VARIABLE])
    values: dict[str, object] = {}
    origins = dict.fromkeys(known, "the default")
    for origin, layer in (
        ("a quarter of the memory here", _of_this_machine()),
        ("where this platform has data", _of_this_platform()),
        (str(file), _of_file(file, known) if file is not None else {}),
        ("", EnvSettingsSource(_Checked)()),
        ("", flags),
    ):
        for name, value in layer.items():
            values[name] = value
            origins[name] = origin or (known[name].flag if layer is flags else known[name].variable)
    settings = _checked(values, known, origins)
    _check_together(settings)
    return Configured(settings, origins)


def _checked(values: Mapping[str, Any], known: Mapping[str, Option], origins: Mapping[str, str]) -> Settings:
    try:
        found = _Checked(**values)
    except ValidationError as error:
        first = error.errors()[0]
        wrong = known[str(first["loc"][0])]
        message = first["msg"].removeprefix("Value error, ")
        origin = origins[wrong.name]
        said = "" if origin in (wrong.flag, wrong.variable) else f" as {origin} has it"
        raise OperatorError(
            f"{wrong.flag} ({wrong.variable}) can't be {first['input']!r}{said}: {message[0].lower()}{message[1:]}"
        ) from None
    return Settings(**{name: getattr(found, name) for name in known})


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
    _check_gateway(settings)


def _check_gateway(settings: Settings) -> None:
    if settings.gateway_port is None:
        return
    if settings.gateway_host not in LOOPBACK and not settings.insecure_bind:
        raise OperatorError(
            f"--gateway-host {settings.gateway_host} would serve other machines, and a gateway brings neither TLS nor "
            "tokens: keep it on this machine, or say --insecure-bind"
        )
    if settings.token_file is not None and settings.gateway_tenant is None:
        raise OperatorError("--gateway-port beside --token-file needs --gateway-tenant: whose agents its clients see")
    if settings.token_file is None and settings.gateway_tenant is not None:
        raise OperatorError(
            "--gateway-tenant needs --token-file: without tokens there is one tenant, which has no name"
        )


def _refuse_misspelt(known: Mapping[str, Option]) -> None:
    variables = {option.variable for option in known.values()} | {*_OTHER_VARIABLES}
    for name in os.environ:
        if not name.startswith(_PREFIX) or name in variables or _KUBERNETES.fullmatch(name.removeprefix(_PREFIX)):
            continue
        if meant := _like(name, variables):
            raise OperatorError(f"the environment has {name}, which sets nothing: {meant} is meant, or it has to go")


def _like(name: str, names: set[str]) -> str:
    """What a misspelt name stands for; "" if nobody can tell. Where all begin with a prefix, that likens nothing."""
    by_rest = {each.removeprefix(_PREFIX): each for each in names}
    found = get_close_matches(name.removeprefix(_PREFIX), by_rest, n=1, cutoff=_LIKE)
    return by_rest[found[0]] if found else ""


def _of_this_machine() -> dict[str, Any]:
    """Defaults that follow from the machine."""
    quarter = memory.usable_bytes() // 4
    return {"hot_bytes": quarter, "inflight_bytes": quarter}


def _of_this_platform() -> dict[str, Any]:
    return {"data_dir": places.data_dir()}


def _of_file(path: Path, known: Mapping[str, Option]) -> dict[str, Any]:
    """
    Raises:
        OperatorError: it can't be read, or has what is no setting.
    """
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OperatorError(f"the settings in {path} can't be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OperatorError(f"the settings in {path} are not TOML: {error}") from error
    found: dict[str, Any] = {}
    for key, value in told.items():
        name = key.replace("-", "_")
        if name not in known:
            meant = _like(name, {*known})
            raise OperatorError(
                f"{path} has {key!r}, which is no setting"
                + (f": {meant!r} is meant" if meant else "; `warmkv config show` lists them")
            )
        if name in found:
            raise OperatorError(f"{path} has {name!r} twice, once as {key!r}; take one out")
        found[name] = value
    return found


class _Base(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=_PREFIX, extra="forbid")


_FIELDS: dict[str, Any] = {field.name: (_HINTS[field.name], field.default) for field in fields(Settings)}
_Checked = create_model("_Checked", __base__=_Base, **_FIELDS)
"""`Settings`, as the library reads and checks them."""
