"""That every fault of `make mutate` can still be planted: planting them all takes too long for every run."""

import ast

import pytest
from planting import all_faults, place

FAULTS = all_faults()


def test_there_are_faults_of_every_language():
    assert len(FAULTS) > 160
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert {fault.file.rpartition(".")[2] for fault in FAULTS} >= {"py", "h", "cpp"}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_its_place_is_there_once_and_its_tests_are(fault):
    faulty = fault.plant()
    assert fault.find.split() != fault.replace.split()
    if fault.file.endswith(".py"):
        ast.parse(faulty)
    assert fault.test_files()


PYTHON = """
class Sweep:
    def run(self):
        return self.a + 1

class Other:
    def run(self):
        return self.b + 1
"""
CPP = """
// void run() { a + 1; }
template <class A>
struct Sweep : Base<A> {
  int run(int a) const { return a + 1; }
};
struct Other {
  Other() : a_{1} {}
  int run(int b) { auto f = [&](int c) { if (c) { b += 1; } return "}"; }; return b  +
     1; }
};
"""


@pytest.mark.parametrize(("text", "file"), [(PYTHON, "a.py"), (CPP, "a.h")], ids=["Python", "C++"])
def test_a_place_is_sought_in_its_function_alone(text, file):
    of_b = "self.b + 1" if file == "a.py" else "b + 1"
    for within, find in (("Sweep.run", "+ 1"), ("Sweep", "+ 1"), ("Other.run", of_b), ("run", of_b)):
        start, end = place(text, file, within, find)
        assert text[start:end].split() == find.split()
        assert (start < text.index("Other")) == within.startswith("Sweep")
    for within, find, message in (
        ("run", "+ 1", "2 times"),
        ("Sweep.run", of_b, "0 times"),
        ("Third", "+", "no Third"),
    ):
        with pytest.raises(LookupError, match=message):
            place(text, file, within, find)
