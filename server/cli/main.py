"""The `loraplex` command. The flags of `serve` are derived from the fields of `ServeConfig`."""

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from server import config as settings
from server.cli import adapters as adapter_commands
from server.cli import convert as folder_commands
from server.cli import keys as key_commands
from server.cli import registry as registry_commands
from server.cli import sync as sync_commands
from server.cli.doctor import doctor
from server.cli.plan import plan
from server.cli.replay import replay
from server.cli.trace import trace
from server.cli.vllm_flags import FlagRefused, translated
from server.config import HINTS, ConfigError, ServeConfig

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def loraplex() -> None:
    """Serve one base model with many LoRA adapters in one forward pass."""


def _flag(name: str) -> inspect.Parameter:
    """Return the command-line option of one setting; its value is None if the flag is not given."""
    field = ServeConfig.__dataclass_fields__[name]
    default = None if field.metadata.get("secret") or field.default in ("", (), Path()) else str(field.default)
    hint: Any = HINTS[name]
    kind: Any = list[str] if field.metadata.get("repeatable") else hint if hint in (int, float, bool, Path) else str
    option = typer.Option(
        settings.flag_name(name),
        help=field.metadata["help"] + (f" (default: {default})" if default else ""),
        envvar=None,
        show_default=False,
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


class ServeCommand(TyperCommand):
    """The command `serve`, which understands vLLM's flags and says what they mean."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            arguments, notes = translated(args)
        except FlagRefused as refused:
            ctx.fail(str(refused))
        for note in notes:
            typer.echo(note, err=True)
        return super().parse_args(ctx, arguments)


def serve(**flags: Any) -> None:
    """Serve the base model and its adapters over HTTP."""
    from server.config import StartFailed
    from server.launch import launch
    from server.logs import configure_logging

    config_file = flags.pop("config")
    given = {name: value for name, value in flags.items() if value is not None and value != []}
    try:
        config = settings.load(given, config_file)
        configure_logging(config.log_format)
        launch(config)
    except (ConfigError, StartFailed) as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from error


_CONFIG_FLAG = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[Path | None, typer.Option("--config", help="TOML or YAML file with these settings")],
)
serve.__signature__ = inspect.Signature([_CONFIG_FLAG, *(_flag(name) for name in HINTS)])  # type: ignore[attr-defined]
serve.__annotations__ = {p.name: p.annotation for p in serve.__signature__.parameters.values()}  # type: ignore[attr-defined]
app.command(cls=ServeCommand, options_metavar="[MODEL] [OPTIONS]")(serve)
app.command()(adapter_commands.chat)
app.command()(folder_commands.convert)
app.command()(folder_commands.merge_adapters)
app.command()(adapter_commands.merge)
app.command()(adapter_commands.unmerge)
app.command()(sync_commands.sync)
app.command()(doctor)
app.command()(plan)
app.command()(trace)
app.command()(replay)
app.add_typer(adapter_commands.app, name="adapters")
app.add_typer(key_commands.app, name="keys")
app.add_typer(registry_commands.app, name="registry")


def main() -> None:
    app()
