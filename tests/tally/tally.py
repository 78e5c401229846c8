#!/usr/bin/env python3
"""Counts the cases in XML reports of ctest or GoogleTest and appends "passed failed skipped" to a tally file.

A ctest entry that is a whole GoogleTest run counts by its cases, any other entry as one. Failures are printed, the first
with the end of their output, skipped cases grouped by their reason. An empty run counts as one failure: a suite that
disappeared must not look like a suite that passed.
"""
import argparse
import collections
import re
import sys
import xml.etree.ElementTree as ElementTree

RAN = re.compile(r"\[==========\] (\d+) tests? from .* ran\.")
PASSED = re.compile(r"\[  PASSED  \] (\d+) tests?\.")
SKIPPED = re.compile(r"\[  SKIPPED \] (\d+) tests?, listed below")
REASON = re.compile(r"^(?:[^\n]*: )?(?:Skipped|SKIPPED):?\s+(.+?)\s*$", re.MULTILINE)
SEED = re.compile(r"^ADAATTN_TEST_SEED=\d+", re.MULTILINE)
FAILURES_IN_FULL, OUTPUT_TAIL = 5, 2500


def skip_reasons(output, count):
    reasons = [reason.strip() for reason in REASON.findall(output)][:count]
    return reasons + ["no reason given"] * (count - len(reasons))


def skip_message(element):
    lines = ((element.get("message") if element is not None else "") or "").strip().splitlines()
    return lines[-1] if lines else "no reason given"


def failure_text(case):
    failures = [failure.text or "" for failure in case.findall("failure")]
    return "\n".join([case.findtext("system-out") or "", *failures])


def count_case(case):
    """(passed, failed, [reasons of the skipped cases]) of one entry."""
    if case.get("result"):  # GoogleTest's own report
        if case.find("failure") is not None:
            return 0, 1, []
        skip = case.find("skipped")
        if skip is not None or case.get("result") == "skipped":
            return 0, 0, [skip_message(skip)]
        return (1, 0, []) if case.get("result") == "completed" else (0, 0, [])
    output = case.findtext("system-out") or ""
    ran = RAN.search(output)
    if ran and int(ran[1]) > 0:
        passed = int(PASSED.search(output)[1]) if PASSED.search(output) else 0
        skipped = int(SKIPPED.search(output)[1]) if SKIPPED.search(output) else 0
        failed = int(ran[1]) - passed - skipped
        if failed == 0 and case.find("failure") is not None:  # failed outside its cases, say by a leak at exit
            passed, failed = max(passed - 1, 0), 1
        return passed, failed, skip_reasons(output, skipped)
    if case.find("failure") is not None or case.find("error") is not None:
        return 0, 1, []
    if case.get("status") == "run" and case.find("skipped") is None:
        return 1, 0, []
    if case.get("status") == "disabled":
        return 0, 0, ["disabled"]
    if case.find("skipped") is not None and "SKIP_" in (case.find("skipped").get("message") or ""):
        return 0, 0, skip_reasons(output, 1)
    return 0, 1, []  # not run for any other reason: a missing binary, a failed fixture


def run(reports, tally):
    """Counts the reports into tally; 1 if anything failed."""
    passed = failed = failures = 0
    reasons = collections.Counter()
    for case in (case for report in reports for case in ElementTree.parse(report).getroot().iter("testcase")):
        case_passed, case_failed, case_reasons = count_case(case)
        passed += case_passed
        failed += case_failed
        reasons.update(case_reasons)
        if case_failed:
            seed = SEED.search(failure_text(case))
            print(f"FAILED {case.get('name')}", *([f"({seed[0]} repeats it)"] if seed else []))
            failures += 1
            if failures <= FAILURES_IN_FULL:
                print(failure_text(case)[-OUTPUT_TAIL:])
    skipped = sum(reasons.values())
    if passed + failed + skipped == 0:
        print("FAILED: no test ran")
        failed = 1
    for reason, count in sorted(reasons.items()):
        print(f"skipped {count}: {reason}")
    with open(tally, "a", encoding="utf-8") as file:
        file.write(f"{passed} {failed} {skipped}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tally")
    parser.add_argument("reports", nargs="+")
    arguments = parser.parse_args()
    sys.exit(run(arguments.reports, arguments.tally))
