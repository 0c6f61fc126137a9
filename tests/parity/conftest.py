import pytest
from recordings import KINDS, OURS, found, is_of_another_model, listed


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with a parameter of `KINDS` runs once for every recording of that kind."""
    folder = metafunc.config.getoption("--fixtures")
    for name in KINDS.keys() & {*metafunc.fixturenames}:
        paths = found(folder, name)
        if folder.resolve() == OURS and len(paths) != KINDS[name].ours:
            where = folder / KINDS[name].folder
            pytest.fail(f"{where} holds {len(paths)} recordings for {name}, not {KINDS[name].ours}", pytrace=False)
        given = [pytest.param(path, id=path.stem) for path in paths]
        none = pytest.mark.skip(reason=f"{folder} has no recording for {name}")
        metafunc.parametrize(name, given or [pytest.param(None, marks=none, id="none")])


def pytest_collection_modifyitems(config: pytest.Config) -> None:
    """A folder given on the command line is of use, and all of it is replayed.

    Raises:
        pytest.UsageError: it holds no recording, or one of no kind, or those of no method.
    """
    folder = config.getoption("--fixtures")
    if not any(found(folder, name) for name in KINDS):
        raise pytest.UsageError(f"--fixtures {folder} holds no recordings: one folder for each method, with json files")
    methods = {kind.folder for kind in KINDS.values()}
    for other in sorted(path for path in folder.iterdir() if path.is_dir() and path.name not in methods):
        if any(listed(folder, other.name)):
            raise pytest.UsageError(
                f"{other} holds recordings of no method that is replayed: {', '.join(sorted(methods))}"
            )
    for method in sorted(methods):
        known = {path for name, kind in KINDS.items() if kind.folder == method for path in found(folder, name)}
        lost = [path for path in listed(folder, method) if path not in known and not is_of_another_model(method, path)]
        if lost:
            raise pytest.UsageError(f"{lost[0]} is a recording of no kind that is replayed")
