"""`accelerate launch train.py recipe=sft`: compose the configuration, pass the typed door, run the stage.

The only importer of hydra. Hydra composes and nothing else: no working directory, no log file, no job of its own, so
that several processes of one run see one configuration.
"""

import importlib
import sys

from aquila_sft import cli
from aquila_sft.config.runs import Run
from aquila_sft.door import load
from aquila_sft.errors import DONE, STOPPED, USER_ERROR, Stopped, UserError, disk_fault


def compose(words: list[str]):
    """Overrides as typed by a person -> composed DictConfig. Raises UserError."""
    overrides = cli.prepare_overrides(words)  # before hydra is imported: a slip is answered at once
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    with hydra.initialize_config_dir(str(cli.RECIPES), version_base="1.3"):
        try:
            return hydra.compose("config", overrides)
        except (HydraException, OmegaConfBaseException) as error:
            groups = [o for o in overrides if o.split("=")[0] in cli.GROUPS]
            try:
                known = OmegaConf.to_container(hydra.compose("config", groups))
            except (HydraException, OmegaConfBaseException):
                known = {}
            raise UserError(cli.refused_override(str(error), words, flat_keys(known))) from None


def flat_keys(tree: dict, prefix: str = "") -> list[str]:
    keys = []
    for key, value in tree.items():
        keys.append(prefix + key)
        if isinstance(value, dict):
            keys += flat_keys(value, f"{prefix}{key}.")
    return keys


def compose_run(words: list[str]) -> Run:
    """What a stage is handed to build its prerequisites: another recipe's run, from overrides."""
    return load(compose(words))


def main(words: list[str]) -> int:
    if not words or {"-h", "--help", "help"} & set(words):
        print(cli.usage(), end="")
        return DONE if words else USER_ERROR
    try:
        show = "--cfg" in words
        cfg = compose([w for w in words if w != "--cfg"])
        run = load(cfg)
        if show:
            from omegaconf import OmegaConf

            print(OmegaConf.to_yaml(cfg, resolve=True), end="")
            return DONE
        stage = importlib.import_module(f"aquila_sft.stages.{run.stage}")
        if not run.evaluate:
            stage.run(run, compose_run)
        else:
            from aquila_sft.stages import eval as evaluation

            afterwards = evaluation.of_training(run, compose_run)  # a slip in it is answered before hours are spent
            stage.run(run, compose_run)
            evaluation.after_training(afterwards, compose_run)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        if disk_fault(error) is None:
            raise
        print(f"error: {error}; nothing that was saved is lost, the same command goes on", file=sys.stderr)
        return USER_ERROR
    except (Stopped, KeyboardInterrupt) as stop:
        print(f"stopped: {stop or 'Ctrl-C'}", file=sys.stderr)
        return STOPPED
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
