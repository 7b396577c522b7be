"""Checks Kubernetes manifests against JSON Schemas that lie here, and makes those.

    manifests.py check MANIFEST...      every manifest is valid, and none with a misspelt key is
    manifests.py make                   writes kubernetes.schema.json out of the package kubernetes-validate (pip install kubernetes-validate)

`kubernetes.schema.json` has a Job and what it consists of, in the strict form that refuses unknown keys, without descriptions and without kinds
of volumes that no manifest here uses. `mpijob.schema.json` is written by hand after the resource definition of Kubeflow's MPI operator, version
0.6 (manifests/base/kubeflow.org_mpijobs.yaml); its pods are those of the first.
"""

import copy
import importlib.resources
import json
import pathlib
import sys

here = pathlib.Path(__file__).parent
KUBERNETES = "v1.37.0"
POD = "io.k8s.api.core.v1."
VOLUMES = {"configMap", "emptyDir", "hostPath", "name", "nfs", "persistentVolumeClaim", "secret"}


def stripped(schema):
    """Without descriptions and the extensions of Kubernetes; references stay within one file."""
    if isinstance(schema, list):
        return [stripped(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {}
    for key, value in schema.items():
        if key == "properties":
            kept[key] = {name: stripped(one) for name, one in value.items()}
        elif key == "$ref":
            kept[key] = "#/$defs/" + value.rsplit("/", 1)[1]
        elif key != "description" and not key.startswith("x-"):
            kept[key] = stripped(value)
    return kept


def references(schema):
    if isinstance(schema, list):
        return set().union(*map(references, schema))
    if not isinstance(schema, dict):
        return set()
    own = {schema["$ref"].rsplit("/", 1)[1]} if isinstance(schema.get("$ref"), str) else set()
    return own.union(*map(references, schema.values()))


def make():
    folder = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"{KUBERNETES}-local-strict"
    known = {name: stripped(one) for name, one in json.loads((folder / "_definitions.json").read_text())["$defs"].items()}
    volume = known[POD + "Volume"]["properties"]
    known[POD + "Volume"]["properties"] = {name: volume[name] for name in VOLUMES}
    job = stripped(json.loads((folder / "job-batch-v1.json").read_text()))
    del job["properties"]["status"]  # the cluster's to write
    needed, found = references(job) | {POD + "PodTemplateSpec"}, {}
    while needed:
        name = needed.pop()
        found[name] = known[name]
        needed |= references(known[name]) - found.keys()
    # A line for each definition.
    lines = [f"    {json.dumps(name)}: {json.dumps(found[name], sort_keys=True)}" for name in sorted(found)]
    text = json.dumps(job, sort_keys=True)[:-1] + ', "$defs": {\n' + ",\n".join(lines) + "\n}}\n"
    (here / "kubernetes.schema.json").write_text(text)


def misspelt(value, at=""):
    """Every copy of `value` with one key misspelt, and which."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if isinstance(key, str):
            yield f"{at}/{key}", {(name + "z" if name == key else name): one for name, one in value.items()}
        for place, spoilt in misspelt(inner, f"{at}/{key}"):
            whole = copy.copy(value)
            whole[key] = spoilt
            yield place, whole


def check(paths):
    import jsonschema
    import referencing
    import yaml

    kubernetes, mpijob = (json.loads((here / f"{name}.schema.json").read_text()) for name in ("kubernetes", "mpijob"))
    resource = referencing.Resource.from_contents(kubernetes, referencing.jsonschema.DRAFT202012)
    registry = referencing.Registry().with_resource("kubernetes.schema.json", resource)
    kinds = {
        kind: jsonschema.Draft202012Validator(schema, registry=registry) for kind, schema in [("Job", kubernetes), ("MPIJob", mpijob)]
    }
    failed = 0
    for path in paths:
        for manifest in yaml.safe_load_all(pathlib.Path(path).read_text()):
            validator = kinds[manifest["kind"]]
            told = [f"{'/'.join(map(str, error.absolute_path))}: {error.message}" for error in validator.iter_errors(manifest)]
            spoilt = list(misspelt(manifest))
            # The names of resources and of claims' limits are free.
            told += [
                f"{place}, misspelt, is not noticed" for place, one in spoilt if "/limits/" not in place and validator.is_valid(one)
            ]
            failed += len(told)
            print(f"{'FAILED ' if told else 'ok     '} {path}: {manifest['kind']}, {len(spoilt)} keys misspelt in turn", *told, sep="\n        ")
    sys.exit(failed > 0)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make"]:
            make()
        case ["check", _, *_]:
            check(sys.argv[2:])
        case _:
            sys.exit(__doc__)
