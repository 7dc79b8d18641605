"""The faults that `make faults` plants still fit the code, and a fault planted is found or said to survive."""

import faults
import pytest

FOUND = [faults.Fault.read(patch) for patch in sorted(faults.FAULTS.glob("*.patch"))]


def test_there_are_enough_faults_and_each_is_another_one():
    assert len(FOUND) >= 40 and len({fault.what for fault in FOUND}) == len(FOUND)


@pytest.mark.parametrize("fault", FOUND, ids=lambda fault: fault.name)
def test_each_fault_can_be_planted_and_its_tests_exist(fault):
    fault.applied(faults.ROOT, "--check")
    assert fault.tests and all((faults.ROOT / test).is_file() for test in fault.tests)


def test_a_fault_is_caught_by_a_test_that_looks_and_survives_one_that_does_not(tmp_path):
    (tmp_path / "doubling.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "test_looks.py").write_text(
        "import doubling\n\n\ndef test_double():\n    assert doubling.double(3) == 6\n"
    )
    (tmp_path / "test_blind.py").write_text("def test_nothing():\n    assert True\n")
    patch = tmp_path / "tripled.patch"
    patch.write_text(
        "what: doubles are triples\ntests: test_looks.py\n"
        "--- a/doubling.py\n+++ b/doubling.py\n@@ -1,2 +1,2 @@\n def double(x):\n-    return 2 * x\n+    return 3 * x\n"
    )
    fault = faults.Fault.read(patch)
    assert faults.first_failure(tmp_path, fault.tests) is None
    fault.applied(tmp_path)
    assert faults.first_failure(tmp_path, fault.tests) == "test_looks.py::test_double"
    assert faults.first_failure(tmp_path, ("test_blind.py",)) is None
    fault.applied(tmp_path, "--reverse")
    assert "2 * x" in (tmp_path / "doubling.py").read_text()
