import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from cellray.core.errors import DataError
from cellray.data import schema


def test_obs_keeps_types_and_renames_what_the_store_uses_itself():
    obs = pd.DataFrame(
        {
            "donor": pd.Categorical(["a", None]),
            "age": np.array([3, 4], np.int32),
            "score": np.array([0.5, np.nan], np.float32),
            "half": np.array([1, 2], np.float16),
            "doublet": [True, False],
            "maybe": pd.array([True, None], dtype="boolean"),
            "count": pd.array([1, None], dtype="Int64"),
            "cluster": pd.Categorical([1, 2]),
            "mixed": [1, "x"],
            "nnz": [7, 8],
            "nnz_source": [1, 1],
            "soma_joinid": [5, 6],
        }
    )
    table = schema.obs_to_arrow(obs)
    types = {f.name: str(f.type) for f in table.schema}
    assert types == {
        "donor": "large_string",
        "age": "int32",
        "score": "float",
        "half": "float",
        "doublet": "bool",
        "maybe": "bool",
        "count": "int64",
        "cluster": "int64",
        "mixed": "large_string",
        "nnz_source_source": "int64",
        "nnz_source": "int64",
        "joinid_source": "int64",
    }
    assert table.column("donor").to_pylist() == ["a", None]
    assert table.column("maybe").to_pylist() == [True, None]
    assert table.column("mixed").to_pylist() == ["1", "x"]
    assert table.column("nnz_source_source").to_pylist() == [7, 8]


def values(table, name):
    return table.column(name).to_pylist()


def test_unify_is_the_union_with_nulls():
    one = pa.table({"a": ["x", "y"], "n": pa.array([1, 2], pa.int32())})
    two = pa.table({"b": [True], "n": pa.array([3], pa.int32())})
    joined = schema.unify([one, two])
    assert joined.column_names == ["a", "n", "b"]
    assert values(joined, "a") == ["x", "y", None]
    assert values(joined, "b") == [None, None, True]
    assert values(joined, "n") == [1, 2, 3]
    assert joined.schema.field("n").type == pa.int32()


@pytest.mark.parametrize(
    ("one", "two", "kind", "expected"),
    [
        (pa.array([1], pa.int32()), pa.array([2], pa.int64()), pa.int64(), [1, 2]),
        (pa.array([1], pa.int32()), pa.array([0.5]), pa.float64(), [1.0, 0.5]),
        (pa.array([0.5], pa.float32()), pa.array([2.5]), pa.float64(), [0.5, 2.5]),
        (pa.array([1]), pa.array(["x"], pa.large_string()), None, ["1", "x"]),
        (pa.array([True]), pa.array([2]), None, ["true", "2"]),
        (pa.array([None], pa.large_string()), pa.array([2]), pa.int64(), [None, 2]),
    ],
)
def test_types_that_differ_widen_or_become_text(one, two, kind, expected):
    joined = schema.unify([pa.table({"c": one}), pa.table({"c": two})])
    assert values(joined, "c") == expected
    if kind is not None:
        assert joined.schema.field("c").type == kind


def test_labels_are_sorted_and_near_unique_text_stays_plain():
    labels = ["b", "a", None, "b"] * 50
    table = schema.unify([pa.table({"c": labels, "id": [str(i) for i in range(200)]})])
    column = table.column("c").combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    assert column.dictionary.to_pylist() == ["a", "b"]
    assert column.to_pylist() == labels
    assert pa.types.is_large_string(table.schema.field("id").type)


def test_a_second_unify_changes_nothing():
    first = schema.unify([pa.table({"c": ["b", "a", None] * 40})])
    again = schema.unify([first, pa.table({"c": ["0"]})])
    assert values(again, "c") == ["b", "a", None] * 40 + ["0"]


def test_nothing_to_stack():
    with pytest.raises(DataError, match="no obs tables to stack"):
        schema.unify([])


def test_numbers_that_no_type_of_both_holds_become_text():
    big = 1 << 60
    joined = schema.unify([pa.table({"c": [big, 1]}), pa.table({"c": [0.5]})])
    assert joined.column("c").to_pylist() == [str(big), "1", "0.5"]
    unsigned = pa.table({"c": pa.array([(1 << 63) + 1], pa.uint64())})
    assert schema.unify([unsigned, pa.table({"c": [-1]})]).column("c").to_pylist() == [
        str((1 << 63) + 1),
        "-1",
    ]
    assert schema.unify([pa.table({"c": [3]}), pa.table({"c": [0.5]})]).column("c").to_pylist() == [
        3.0,
        0.5,
    ]


def test_labels_are_stacked_by_their_codes_as_by_their_words():
    one = pa.array(["x", "a", None, "a"] * 20).dictionary_encode()
    two = pa.DictionaryArray.from_arrays(pa.array([2, 0], pa.int8()), ["a", "unused", "y"])
    tables = [pa.table({"c": one}), pa.table({"d": [1]}), pa.table({"c": two})]
    column = schema.unify(tables).column("c").combine_chunks()
    assert column.to_pylist() == [*["x", "a", None, "a"] * 20, None, "y", "a"]
    assert column.dictionary.to_pylist() == ["a", "x", "y"]
    spelled = [
        pa.table({"c": t["c"].cast(pa.string())}) if "c" in t.column_names else t for t in tables
    ]
    assert schema.unify(spelled).column("c").combine_chunks().equals(column)
    many = pa.array([str(i) for i in range(200)]).dictionary_encode()
    assert schema.unify([pa.table({"c": many})]).column("c").type == pa.large_string()
