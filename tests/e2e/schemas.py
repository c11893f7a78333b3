"""JSON Schemas by keyword: those that an answer can be held to, and those that are refused."""

from __future__ import annotations

from typing import Any

TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1}},
            "required": ["children"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "kind": {"enum": ["cat", "dog", "other"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}

ENFORCED: dict[str, Any] = {
    "type": {"type": ["string", "null", "boolean"], "maxLength": 9},
    "properties": PERSON,
    "properties, others allowed": {"type": "object", "properties": {"a": {"type": "integer"}}, "maxProperties": 3}
    | {"required": ["a"]},
    "required of what is nowhere else": {"type": "object", "required": ["z"], "properties": {"a": {"type": "null"}}},
    "additionalProperties": {"type": "object", "additionalProperties": {"type": "integer"}},
    "patternProperties": {
        "type": "object",
        "patternProperties": {"^x[0-9]$": {"type": "integer"}},
        "additionalProperties": False,
    },
    "minProperties": {
        "type": "object",
        "minProperties": 1,
        "maxProperties": 2,
        "additionalProperties": {"type": "null"},
    },
    "items": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 4},
    "prefixItems": {"type": "array", "prefixItems": [{"type": "integer"}, {"enum": ["a"]}], "items": False},
    "prefixItems and items": {
        "prefixItems": [{"type": "integer"}],
        "items": {"type": "null"},
        "minItems": 2,
        "maxItems": 3,
    }
    | {"type": "array"},
    "enum": {"enum": [1.5, None, True, "x/y", {"a": [1, 2]}, [], "é", "\n"]},
    "const": {"const": {"b": 1, "a": ["ü", 2.5]}},
    "minLength": {"type": "string", "minLength": 2, "maxLength": 4},
    "pattern": {"type": "string", "pattern": r"^[A-Z]{2}-\d{2,3}$"},
    "pattern anywhere": {"type": "string", "pattern": "b", "maxLength": 12},
    "minimum": {"type": "number", "minimum": -2.5, "exclusiveMaximum": 7.25},
    "exclusiveMinimum": {"type": "integer", "exclusiveMinimum": -17, "maximum": 104},
    "multipleOf": {"type": "integer", "multipleOf": 7},
    "anyOf": {"anyOf": [{"type": "integer", "maximum": 5}, {"type": "string", "maxLength": 2}]},
    "oneOf of what excludes each other": {"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 3}]},
    "allOf": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
    "allOf of objects": {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
        "allOf": [{"minProperties": 1}],
    },
    "told apart by a constant": {
        "anyOf": [
            {"type": "object", "properties": {"k": {"const": "a"}, "v": {"type": "null"}}, "required": ["k", "v"]}
            | {"additionalProperties": False},
            {"type": "object", "properties": {"k": {"const": "b"}}, "required": ["k"], "additionalProperties": False},
        ]
    },
    "$ref to itself": TREE,
    "$schema of another draft": {"$schema": "http://json-schema.org/draft-07/schema#", "enum": [1]},
    "annotations": {"type": "integer", "title": "t", "description": "d", "default": 1, "examples": [2], "maximum": 3}
    | {"deprecated": True, "readOnly": True, "$comment": "c", "minimum": 1},
    "true": True,
    "format among others": {"type": "string", "format": "date", "pattern": "-02-"},
    "$anchor": {"$ref": "#word", "$defs": {"word": {"$anchor": "word", "type": "string", "maxLength": 4}}},
    "contentEncoding": {
        "type": "string",
        "maxLength": 3,
        "contentEncoding": "base64",
        "contentMediaType": "text/plain",
    },
    "any object": {"type": "object", "maxProperties": 2},
    **{
        f"format {name}": {"type": "string", "format": name}
        for name in ("date", "time", "date-time", "duration", "ipv4", "ipv6", "uuid")
    },
}

REFUSED: dict[str, Any] = {
    "not": {"not": {"type": "string"}},
    "if": {"if": {"type": "string"}, "then": {"maxLength": 3}},
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "contains": {"type": "array", "contains": {"type": "null"}},
    "minContains": {"type": "array", "contains": {"type": "null"}, "minContains": 2},
    "maxContains": {"type": "array", "contains": {"type": "null"}, "maxContains": 2},
    "dependentSchemas": {"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}},
    "unevaluatedItems": {"type": "array", "unevaluatedItems": False},
    "then": {"if": {"type": "string"}, "then": {"maxLength": 3}},
    "else": {"if": {"type": "string"}, "else": {"maximum": 3}},
    "exclusiveMaximum": {"type": "number", "exclusiveMaximum": 1e26},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "propertyNames": {"type": "object", "propertyNames": {"maxLength": 3}},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "$dynamicRef": {"$dynamicRef": "#x"},
    "$ref": {"$ref": "https://json-schema.org/draft/2020-12/schema"},
    "$ref to somewhere": {"$ref": "https://example.org/schema.json"},
    "format": {"type": "string", "format": "idn-hostname"},
    "oneOf": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "pattern": {"type": "string", "pattern": "(?=a)a"},
    "multipleOf": {"type": "number", "multipleOf": 0.01},
    "const": {"const": "\u0001"},
    "minProperties": {"type": "object", "properties": {"a": {}, "b": {}}, "minProperties": 1},
    "patternProperties": {"patternProperties": {"a": {"type": "integer"}, "b": {"type": "null"}}},
}
