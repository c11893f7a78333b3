"""`warmkv models`: which models this machine has, and what one is before it is served."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Annotated, Any

import typer

from warmkv_server import config
from warmkv_server.cli.connection import Json, refusing
from warmkv_server.errors import OperatorError
from warmkv_server.offline import words

models = typer.Typer(help="Look at models before they are served, fetch them and remove them.", no_args_is_help=True)


@models.callback()
def _models() -> None:
    """Look at models before they are served, fetch them and remove them."""


@models.command()
def check(
    model: Annotated[str, typer.Argument(help="As --model of `warmkv serve`: a folder, builtin:tiny, ORG/NAME[@REV].")],
    adapter: Annotated[str | None, typer.Option(help="As for `warmkv serve`.")] = None,
    chat_template: Annotated[str | None, typer.Option(help="As for `warmkv serve`.", metavar="FILE")] = None,
    kv: Annotated[str | None, typer.Option(help="As for `warmkv serve`.")] = None,
    kv_bits: Annotated[str | None, typer.Option(help="As for `warmkv serve`.")] = None,
    kv_group_size: Annotated[str | None, typer.Option(help="As for `warmkv serve`.")] = None,
    as_json: Json = False,
) -> None:
    """Say what the server would do with a model: its limit, ends of answers, caches and codec, what its tokenizer keeps
    of a text, and which messages its chat template writes. Loads it, and exits with 2 where it would be refused."""
    from warmkv_server.offline.checking import check as look

    given = {
        **{"model": model, "adapter": adapter, "chat_template": chat_template},
        **{"kv": kv, "kv_bits": kv_bits, "kv_group_size": kv_group_size},
    }
    try:
        found = look(config.read({name: value for name, value in given.items() if value is not None}))
    except OperatorError as error:
        if as_json:
            typer.echo(json.dumps({"model": model, "refused": str(error)}))
        typer.echo(f"warmkv: {error}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
        return
    for name, value in _rows(found):
        typer.echo(f"{name:<22} {value}")


@models.command()
def ls(as_json: Json = False) -> None:
    """List the models of a hub that this machine has, in the cache that huggingface_hub keeps."""
    from warmkv_server.offline import hub_cache

    found = hub_cache.models()
    if as_json:
        typer.echo(json.dumps({"cache": str(hub_cache.cache_dir()), "models": [asdict(model) for model in found]}))
        return
    if found:
        rows = words.table(("model", "stands for"), ("files", "on disk", "used"))
        for model in found:
            used = words.ago(time.time() - model.last_used)
            rows.add_row(model.spec, ", ".join(model.refs), str(model.files), words.size(model.nbytes), used)
        words.console().print(rows)
    typer.echo(f"{hub_cache.cache_dir()}: {len(found)} models; builtin:tiny is always there")


@models.command()
def pull(
    model: Annotated[str, typer.Argument(help="ORG/NAME[@REV] of the hub.", metavar="ORG/NAME[@REV]")],
    as_json: Json = False,
) -> None:
    """Fetch a model, as `warmkv serve --model` would, and show how far it is. What is here isn't fetched again."""
    from warmkv_server.offline import hub_cache

    with refusing():
        folder, nbytes = hub_cache.fetch(model)
    if as_json:
        typer.echo(json.dumps({"model": model, "path": str(folder), "nbytes": nbytes}))
    else:
        typer.echo(f"{folder}: {words.size(nbytes)}; serve it with `warmkv serve --model {model}`")


@models.command()
def rm(
    model: Annotated[str, typer.Argument(help="As `warmkv models ls` names it; without @REV all revisions of it.")],
    as_json: Json = False,
) -> None:
    """Delete a model from the cache, which other programs may share. `pull` fetches it again."""
    from warmkv_server.offline import hub_cache

    with refusing():
        gone, freed = hub_cache.remove(model)
    if as_json:
        typer.echo(json.dumps({"removed": [asdict(each) for each in gone], "freed_bytes": freed}))
        return
    for each in gone:
        typer.echo(f"{each.spec}: removed")
    typer.echo(f"{words.size(freed)} freed")


def _rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A line for each finding."""
    yield "model", found["model"]
    yield "device", found["device"]
    yield "context limit", f"{found['context_limit']:,} tokens"
    more = "" if found["choosable"] == found["vocabulary"] else f", of which {found['choosable']:,} can be sampled"
    yield "vocabulary", f"{found['vocabulary']:,} ids{more}"
    for end in found["ends"]:
        yield "ends an answer", f"{end['id']} {end['text']} ({', '.join(end['named_by'])})"
    yield "caches", ", ".join(f"{count} {kind}" for kind, count in found["caches"].items())
    yield "kept KV", f"{found['kv_bytes_per_token']:,} bytes a token"
    for coded in found["kv_codecs"]:
        groups = f" in groups of {coded['group_size']}" if coded["group_size"] else ""
        lost = f", loses at most {coded['most_lost']:.1%}" if coded["most_lost"] is not None else ""
        because = f" ({coded['reason']})" if coded["reason"] else ""
        yield f"{coded['of']} of {coded['caches']} caches", f"{coded['codec']}{groups}{lost}{because}"
    if "tokenizer" in found:
        tokenizer = found["tokenizer"]
        kept = "not every text comes back as it was" if tokenizer["changes"] else "texts come back as they were"
        yield "tokenizer", f"{tokenizer['class']}, {tokenizer['ids']:,} ids; {kept}"
    if found["chat_template"]:
        yield "chat template", f"{found['chat_template']}, in place of the model's own"
    if template := found.get("template"):
        for role, said in template["roles"].items():
            yield f"role {role}", said
        for key, name in (
            ("system_alone", "system message alone"),
            ("two_systems", "two system messages"),
            ("tools", "tools"),
            ("reasoning", "reasoning"),
            ("variables", "template variables"),
            ("follow_up", "behind an answer"),
        ):
            yield name, template[key]
        yield "closes an answer with", repr(template["closes_with"]) if template["closes_with"] else "no mark"
    for line in found["unusual"]:
        yield "unusual", line
