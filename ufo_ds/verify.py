"""``ufo verify``: proofs that anybody can run."""

import importlib
import sys

from ufo_ds.errors import UserError, run

VERBS = {
    "resume": "a checkpoint goes on at any other topology",
    "untouched": "adding or removing a task left all others the same to the bit",
}


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    verb = words[0] if words else "--help"
    if verb in ("-h", "--help"):
        print("usage: ufo verify PROOF ...   (ufo verify PROOF --help)\n")
        print("\n".join(f"  {name:<9}  {text}" for name, text in VERBS.items()))
        return
    if verb not in VERBS:
        raise UserError(f"ufo verify {verb!r}: use one of {', '.join(VERBS)}")
    importlib.import_module(f"ufo_ds.verify_{verb}").main(words[1:])


if __name__ == "__main__":
    sys.exit(run(main))
