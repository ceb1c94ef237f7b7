"""The rules that the Hub applies to the metadata of a README, as far as they are known."""

import re

import yaml


LICENSES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0
    cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
    cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
    creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0
    gpl-3.0 grok2-community h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
    """.split()
)
REPO_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
FRONT_MATTER = re.compile(r"^\s*---[ \t]*\r?\n(.*?)(?:\r?\n)?---[ \t]*(?:\r?\n|$)", re.DOTALL)


class StrictLoader(yaml.SafeLoader):
    """A loader that refuses a key given twice, which PyYAML lets pass and the Hub does not."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for index, key in enumerate(keys) if key in keys[:index]]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"duplicated mapping key {twice[0]}", node.start_mark)
        return super().construct_mapping(node, deep)


def metadata(content: str) -> dict | None:
    """Returns the metadata in front of a README, None where there is none.

    Raises:
        yaml.YAMLError: it is not valid YAML.
    """
    match = FRONT_MATTER.match(content)
    return yaml.load(match[1], StrictLoader) if match else None


def check(content: str, kind: str = "model") -> tuple[list[str], list[str]]:
    """Returns the errors and the warnings that the Hub has about a README of a kind of repository."""
    try:
        data = metadata(content)
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}"], []
    if not data:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ["YAML Metadata Error: the metadata must be a mapping"], []
    errors = _field_errors(data)
    if kind == "model" and "model-index" in data:
        errors += _model_index_errors(data["model-index"])
    return errors, []


def _as_list(value: object) -> list:
    return value if isinstance(value, list) else [value]


def _field_errors(data: dict) -> list[str]:
    errors = []
    for key in ("license", "base_model", "datasets", "language", "metrics"):
        for index, value in enumerate(_as_list(data[key]) if key in data else []):
            name = f'"{key}[{index}]"' if isinstance(data[key], list) else f'"{key}"'
            if not isinstance(value, str):
                errors.append(f"{name} must be a string")
            elif key == "license" and value not in LICENSES:
                errors.append(f"{name} must be one of [{', '.join(sorted(LICENSES))}]")
            elif key in ("base_model", "datasets") and not REPO_ID.fullmatch(value):
                errors.append(f'{name} with value "{value}" is not valid. Use an id from https://hf.co.')
            elif key == "language" and not value.islower():
                errors.append(f"{name} must only contain lowercase characters")
    for key in ("pipeline_tag", "library_name", "license_name"):
        if not isinstance(data.get(key, ""), str):
            errors.append(f'"{key}" must be a string')
    if "tags" in data and not (isinstance(data["tags"], list) and all(isinstance(tag, str) for tag in data["tags"])):
        errors.append('"tags" must be an array of strings')
    return errors


def _model_index_errors(index: object) -> list[str]:
    errors = []

    def required(where: object, key: str, name: str) -> object:
        value = where.get(key) if isinstance(where, dict) else None
        if value is None:
            errors.append(f'"{name}.{key}" is required')
        return value

    def items(value: object, name: str) -> list[tuple[str, object]]:
        if value is not None and not isinstance(value, list):
            errors.append(f'"{name}" must be an array')
        return [(f"{name}[{i}]", item) for i, item in enumerate(value)] if isinstance(value, list) else []

    for name, model in items(index, "model-index"):
        required(model, "name", name)
        for result_name, result in items(required(model, "results", name), f"{name}.results"):
            required(required(result, "task", result_name) or {}, "type", f"{result_name}.task")
            dataset = required(result, "dataset", result_name) or {}
            required(dataset, "type", f"{result_name}.dataset")
            required(dataset, "name", f"{result_name}.dataset")
            for metric_name, metric in items(required(result, "metrics", result_name), f"{result_name}.metrics"):
                required(metric, "type", metric_name)
                required(metric, "value", metric_name)
    return errors
