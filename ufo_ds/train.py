"""Train a recipe with DeepSpeed.

    deepspeed ufo_ds/train.py --deepspeed ds_configs/moe.json
    deepspeed --num_gpus 8 ufo_ds/train.py --deepspeed ds_configs/moe.json --recipe my.yaml --run_dir runs/my
    deepspeed ... --recipe my_elastic.yaml --model.init runs/my     # from what runs/my has trained, routes included

Also under torchrun, accelerate launch and srun, or alone for one process. The same command again goes on from the last
checkpoint of the run directory. Any value of the recipe can be set: --seed 1, --section.key VALUE, and a task's as
--tasks.NAME.key VALUE. Warned of its end by SIGUSR1, to any rank, a run saves after the step and leaves with status 75.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":  # started by its path: the repository, not this folder, is where packages are found
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ufo_ds import recipe as recipes
from ufo_ds import recipe_file
from ufo_ds.errors import ArgumentParser, UserError, run
from ufo_ds.parallel import config as configs
from ufo_ds.parallel.launch import adopt_environment
from ufo_ds.parallel.warning import WarningSignal, signal_named


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """The options, and the recipe's values that the command line overrides.

    Raises:
        UserError: an option that is neither.
    """
    parser = ArgumentParser(
        prog="ufo train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipe", default="demo", help="a shipped recipe or a YAML file (default: demo)")
    parser.add_argument("--task", action="append", help="only this task of the recipe (may be given several times)")
    parser.add_argument("--list_tasks", action="store_true", help="check the recipe, name its tasks, and train nothing")
    parser.add_argument("--run_dir", type=Path, help="where the run lives (default: runs/NAME of the recipe)")
    parser.add_argument("--deepspeed", nargs="?", const="", metavar="JSON", help="how it is spread")
    parser.add_argument("--deepspeed_config", metavar="JSON", help="the same, in DeepSpeed's own form")
    parser.add_argument(
        "--warning_signal", default="USR1", metavar="NAME", help="what warns a run of its end (default: USR1)"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help="set by launchers")
    options, rest = parser.parse_known_args(argv)
    overrides = recipe_file.overrides_of(rest)
    options.deepspeed = options.deepspeed or options.deepspeed_config
    if not options.deepspeed:
        raise UserError("--deepspeed JSON is missing: ds_configs/moe.json is the default layout")
    return options, overrides


def main(argv: list[str] | None = None) -> None:
    """Parse, check everything that can be checked, build, train."""
    world_size = adopt_environment()
    options, overrides = parse_arguments(argv)
    warning = WarningSignal(signal_named(options.warning_signal))
    recipe = recipe_file.load(options.recipe, overrides)
    if options.task:
        recipe = recipes.only(recipe, options.task)
    if options.list_tasks:
        print("\n".join(task.name for task in recipe.tasks))
        return
    run_dir = options.run_dir or Path("runs") / recipe.name
    config = configs.resolve(configs.load(options.deepspeed), options.deepspeed, recipe, world_size)

    from ufo_ds.training import session  # takes seconds to import: only once the command line is known to be right

    session.train(recipe, config, run_dir, warning)


if __name__ == "__main__":
    sys.exit(run(main))
