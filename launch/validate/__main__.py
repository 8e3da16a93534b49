"""`python -m launch.validate FILE ...`: says what is wrong with JobSet manifests; exit status 2 if anything is."""

import argparse
import sys
from collections.abc import Sequence

import yaml

from launch import validate


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.validate", description="Checks JobSet manifests offline.")
    parser.add_argument("files", nargs="+", metavar="FILE")
    wrong = 0
    for name in parser.parse_args(arguments).files:
        try:
            with open(name, encoding="utf-8") as source:
                documents = [each for each in yaml.safe_load_all(source) if each is not None]
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
            wrong += 1
            continue
        if not documents:
            print(f"{name}: there is no document in it", file=sys.stderr)
            wrong += 1
        for document in documents:
            found = validate.problems(document) if isinstance(document, dict) else ["the document is no mapping"]
            for line in found:
                print(f"{name}: {line}", file=sys.stderr)
            wrong += bool(found)
            if not found:
                print(f"{name}: JobSet {document['metadata']['name']} is sound")
    if not validate.has_schemas():
        print("schemas of Kubernetes were not looked at: pip install 't5x_like[launch]'", file=sys.stderr)
    return 2 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
