"""Poison a data set and write it into a folder for use with any other defense; `dataset: poisoned_set` trains on it.

python -m data.poison --config config/wanet.yaml --out DIR [--set K=V] [--gpu N|cpu]
python -m data.poison --config YAML --out record/NAME --format backdoorbench [--weights CHECKPOINT]

With `backdoor: null`, a set that is already poisoned is converted from one format to the other.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    from utils.startup import begin

    begin("data.poison")

from collections.abc import Callable
from functools import partial

from data.poisoned_sets.export import export, write_arrays
from data.poisoned_sets.record_write import Model, write_record
from data.poisoning import ATTACKS
from data.sets import NewClassifier
from utils import plugins
from utils.cli import DEFAULT_CONFIG, Parser, command
from utils.config import Config
from utils.config import load as load_config
from utils.errors import UserError
from utils.paths import user_path
from utils.runtime.machine import choose_machine, set_determinism

FORMATS = ("npz", "backdoorbench")
WeightsOf = Callable[[Config, "str | None"], Model]


def main(new_classifier: NewClassifier, weights_of: WeightsOf | None = None) -> None:
    """Read the command line and write the set.

    Args:
        weights_of: `model.exchange`'s, for a record of BackdoorBench.
    """
    parser = Parser(prog="python -m data.poison", description="Write a poisoned data set into a folder.", allow_abbrev=False)
    parser.add_argument("--config", default=DEFAULT_CONFIG, metavar="YAML", help=f"settings (default {DEFAULT_CONFIG})")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the set: new, empty, or that of the same set")
    parser.add_argument("--format", default=FORMATS[0], choices=FORMATS, help="arrays (default), or a record of BackdoorBench")
    parser.add_argument("--weights", metavar="CHECKPOINT", help="of a run without a defense on this set, for the record")
    parser.add_argument("--gpu", default="0", help="number of the CUDA device on which assets of the attack are made, or cpu")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting of the YAML")
    args = parser.parse_args()
    config = load_config(args.config, args.set)
    device = choose_machine(args.gpu, False, alone=True).device
    set_determinism(config.seed.deterministic, config.seed.benchmark)
    if config.backdoor is None and not config.poisoned_already:
        raise UserError(f"backdoor: null: no attack to poison with: name one of {', '.join(plugins.names(ATTACKS))}")
    write = write_arrays
    if args.format == FORMATS[1]:
        assert weights_of is not None
        write = partial(write_record, model=weights_of(config, args.weights))
    elif args.weights:
        raise UserError(f"--weights {args.weights}: is for --format {FORMATS[1]}: give that too, or leave it out")
    export(config, user_path(args.out, "--out").resolve(), device, new_classifier, write)


if __name__ == "__main__":
    from model.classifier import new_classifier  # allowed in a command; the module itself must not import model/
    from model.exchange import exchanged_weights

    kept = "Finished assets of the attack are kept: the same command uses them."
    command("data.poison", partial(main, new_classifier, exchanged_weights), kept=kept)
