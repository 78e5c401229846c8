#!/usr/bin/env python3
"""Tests of tally.py with reports as ctest and GoogleTest write them."""
import contextlib
import io
import pathlib
import sys
import tempfile
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import tally  # noqa: E402 (found through the line above)

GTEST_SKIP = """[==========] Running 1 test from 1 test suite.
[ RUN      ] Isa.Amx
isa_test.cpp:10: Skipped
the processor has no AMX

[  SKIPPED ] Isa.Amx (0 ms)
[==========] 1 test from 1 test suite ran. (0 ms total)
[  PASSED  ] 0 tests.
[  SKIPPED ] 1 test, listed below:
[  SKIPPED ] Isa.Amx
"""
GTEST_MIXED = """[==========] 6 tests from 2 test suites ran. (5 ms total)
[  PASSED  ] 3 tests.
[  SKIPPED ] 2 tests, listed below:
[  FAILED  ] 1 test, listed below:
"""
GTEST_GREEN = "[==========] 2 tests from 1 test suite ran. (1 ms total)\n[  PASSED  ] 2 tests.\n"
LABELLED_SKIP = '<skipped message="SKIP_RETURN_CODE=77"/>'


def entry(status, inner="", output=""):
    return f'<testcase name="t" classname="c" status="{status}">{inner}<system-out>{output}</system-out></testcase>'


class Tally(unittest.TestCase):
    def run_on(self, *entries):
        """(exit status, passed, failed, skipped, printed text)"""
        with tempfile.TemporaryDirectory() as folder:
            report, counts = pathlib.Path(folder, "report.xml"), pathlib.Path(folder, "tally")
            report.write_text(f"<testsuite>{''.join(entries)}</testsuite>", encoding="utf-8")
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                status = tally.run([report], counts)
            return status, *map(int, counts.read_text(encoding="utf-8").split()), printed.getvalue()

    def test_plain_entries(self):
        self.assertEqual(self.run_on(entry("run"), entry("run"))[:4], (0, 2, 0, 0))
        self.assertEqual(self.run_on(entry("run"), entry("fail", '<failure message=""/>'))[:4], (1, 1, 1, 0))

    def test_googletest_runs_count_by_case(self):
        self.assertEqual(self.run_on(entry("run", output=GTEST_GREEN))[:4], (0, 2, 0, 0))
        self.assertEqual(self.run_on(entry("fail", '<failure message=""/>', GTEST_MIXED))[:4], (1, 3, 1, 2))

    def test_failure_outside_the_cases_is_a_failure(self):
        self.assertEqual(self.run_on(entry("fail", '<failure message=""/>', GTEST_GREEN))[:4], (1, 1, 1, 0))

    def test_failures_name_their_seed(self):
        output = "ADAATTN_TEST_SEED=7 repeats this run\n" + "x" * 2 * tally.OUTPUT_TAIL
        self.assertIn("(ADAATTN_TEST_SEED=7 repeats it)", self.run_on(entry("fail", '<failure message=""/>', output))[4])

    def test_crash_without_a_summary_is_a_failure(self):
        self.assertEqual(self.run_on(entry("fail", '<failure message=""/>', "[ RUN      ] A.B"))[:4], (1, 0, 1, 0))

    def test_skipped_is_not_passed_and_says_why(self):
        skipped = '<skipped message="SKIP_REGULAR_EXPRESSION_MATCHED"/>'
        *counts, printed = self.run_on(entry("run"), entry("notrun", skipped, GTEST_SKIP))
        self.assertEqual(counts, [0, 1, 0, 1])
        self.assertIn("the processor has no AMX", printed)
        *counts, printed = self.run_on(entry("run"), entry("notrun", LABELLED_SKIP, "Skipped: no go on this machine"))
        self.assertEqual(counts, [0, 1, 0, 1])
        self.assertIn("no go on this machine", printed)

    def test_not_run_for_another_reason_is_a_failure(self):
        self.assertEqual(self.run_on(entry("notrun", '<skipped message="Unable to find executable"/>'))[:4], (1, 0, 1, 0))

    def test_empty_report_is_a_failure(self):
        self.assertEqual(self.run_on()[:4], (1, 0, 1, 0))

    def test_googletest_report(self):
        passed = '<testcase name="a" status="run" result="completed"/>'
        failed = '<testcase name="b" status="run" result="completed"><failure message="x">text</failure></testcase>'
        skipped = '<testcase name="c" status="run" result="skipped"><skipped message="c.cpp:1&#10;no AVX2"/></testcase>'
        hidden = '<testcase name="d" status="notrun" result="suppressed"/>'
        *counts, printed = self.run_on(passed, failed, skipped, hidden)
        self.assertEqual(counts, [1, 1, 1, 1])
        self.assertIn("no AVX2", printed)


if __name__ == "__main__":
    unittest.main()
