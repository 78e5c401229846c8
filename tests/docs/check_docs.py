#!/usr/bin/env python3
"""Does what the documentation says. usage: check_docs.py CASE SOURCE_DIR PREFIX LIBDIR WORKDIR"""
import os
import pathlib
import re
import subprocess
import sys

CASE, SOURCE, PREFIX, LIBDIR, WORK = sys.argv[1], *map(pathlib.Path, sys.argv[2:6])
PAGES = [SOURCE / "README.md", SOURCE / "CONTRIBUTING.md", *sorted((SOURCE / "docs").glob("*.md"))]
HEADERS = sorted((SOURCE / "include/adaattn").glob("*.h*"))


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run(*command, cwd=None):
    environment = dict(os.environ, PKG_CONFIG_PATH=str(PREFIX / LIBDIR / "pkgconfig"),
                       LD_LIBRARY_PATH=str(PREFIX / LIBDIR))
    print("+", *command)
    result = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    print(result.stdout)
    assert result.returncode == 0, f"exit status {result.returncode}"
    return result.stdout


def readme_program(name):
    """A directory of its own with the README's program as main.c, and the output the README promises."""
    directory = WORK / name
    directory.mkdir(parents=True, exist_ok=True)
    (program,) = blocks(SOURCE / "README.md", "c")
    (promised,) = blocks(SOURCE / "README.md", "text")
    (directory / "main.c").write_text(program, encoding="utf-8")
    return directory, promised


def readme_program_runs():
    directory, promised = readme_program("program")
    run("cc", "-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{PREFIX}/include", "main.c", f"-L{PREFIX / LIBDIR}",
        "-ladaattn", "-o", "app", cwd=directory)
    assert run("./app", cwd=directory) == promised


def readme_pkg_config_line_works():
    directory, promised = readme_program("pkg_config")
    (line,) = [block for block in blocks(SOURCE / "README.md", "sh") if "pkg-config" in block]
    run("sh", "-ec", line, cwd=directory)
    assert run("./app", cwd=directory) == promised


def readme_cmake_list_works():
    directory, promised = readme_program("cmake")
    (script,) = blocks(SOURCE / "README.md", "cmake")
    (directory / "CMakeLists.txt").write_text(script, encoding="utf-8")
    run("cmake", "-S", directory, "-B", directory / "build", f"-DCMAKE_PREFIX_PATH={PREFIX}")
    run("cmake", "--build", directory / "build")
    assert run(directory / "build/app") == promised


def fragments_compile():
    template = (SOURCE / "tests/docs/fragment.c.in").read_text(encoding="utf-8")
    count = 0
    for page in PAGES[1:]:
        for fragment in blocks(page, "c"):
            source = WORK / f"fragment_{count}.c"
            source.write_text(template.replace("@CODE@", fragment), encoding="utf-8")
            run("cc", "-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{PREFIX}/include", "-fsyntax-only", source)
            count += 1
    assert count > 0


def cpp_program_runs():
    (program,) = [block for page in PAGES for block in blocks(page, "cpp")]
    source = WORK / "program.cpp"
    source.write_text(program, encoding="utf-8")
    run("c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{PREFIX}/include", source, f"-L{PREFIX / LIBDIR}",
        "-ladaattn", "-o", WORK / "cpp_program")
    assert run(WORK / "cpp_program").startswith("0.50\ndesc.softcap is -1;")


def python_program_runs():
    (program,) = [block for page in PAGES for block in blocks(page, "python")]
    # apt brings NumPy to the system's own Python, which need not be the first on the PATH.
    pythons = [python for python in (sys.executable, "/usr/bin/python3") if os.path.exists(python) and subprocess.run(
        [python, "-c", "import numpy"], check=False, stderr=subprocess.DEVNULL).returncode == 0]
    if not pythons:
        print(f"Skipped: no NumPy for {sys.executable}")
        sys.exit(77)
    os.environ["ADAATTN_LIBRARY"] = str(PREFIX / LIBDIR / "libadaattn.so.0")
    os.environ["PYTHONPATH"] = str(SOURCE / "bindings/python")
    kernel, pairs = run(pythons[0], "-c", program).split()
    assert kernel.startswith("prefill_") and int(pairs) == 8 * 128 * 129 // 2, (kernel, pairs)


def links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: no {link}"


def commands_exist():
    usage = run(SOURCE / "dev", "help")
    known = set(re.findall(r"^  ([a-z-]+) ", usage, re.MULTILINE)) | {"help"}
    sections = set(re.search(r"check_sections=\(([^)]*)\)", (SOURCE / "dev").read_text(encoding="utf-8"))[1].split())
    presets = set(re.findall(r'"name": "(\w+)"', (SOURCE / "CMakePresets.json").read_text(encoding="utf-8")))
    for page in PAGES:
        for command, arguments in re.findall(r"\./dev ([a-z-]+)((?: [a-z0-9-]+)*)", page.read_text(encoding="utf-8")):
            assert command in known, f"{page.name}: ./dev {command}"
            for argument in arguments.split():
                if command == "check":
                    assert argument in sections, f"{page.name}: ./dev check {argument}"
                elif command == "build":
                    assert argument in presets, f"{page.name}: ./dev build {argument}"
                elif argument.startswith("-"):
                    assert argument in usage, f"{page.name}: ./dev {command} {argument}"


def names_are_in_the_header():
    declared = "\n".join(file.read_text(encoding="utf-8")
                         for file in [*HEADERS, SOURCE / "bindings/python/adaattn.py"])
    for page in PAGES:
        for name in re.findall(r"`((?:adaattn|ADAATTN)_[A-Za-z0-9_]+)(?:\(\))?`", page.read_text(encoding="utf-8")):
            build_option = re.search(rf"\b{name}\b", (SOURCE / "CMakeLists.txt").read_text(encoding="utf-8"))
            assert re.search(rf"\b{name}\b", declared) or build_option, f"{page.name}: {name}"


def tables_are_those_of_the_results():
    run("python3", SOURCE / "bench/tables.py", "--check")


CASES = {
    "ReadmeProgramRuns": readme_program_runs,
    "ReadmePkgConfigLineWorks": readme_pkg_config_line_works,
    "ReadmeCMakeListWorks": readme_cmake_list_works,
    "FragmentsCompile": fragments_compile,
    "CppProgramRuns": cpp_program_runs,
    "PythonProgramRuns": python_program_runs,
    "LinksLeadSomewhere": links_lead_somewhere,
    "CommandsExist": commands_exist,
    "NamesAreInTheHeader": names_are_in_the_header,
    "TablesAreThoseOfTheResults": tables_are_those_of_the_results,
}
CASES[CASE]()
