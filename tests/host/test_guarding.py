"""Around every node: inputs that are none are named, and no message leaves that the host's log cannot take."""

import sys
import traceback
import types

import pytest

pytest.importorskip("comfy.samplers", reason="no ComfyUI found: the nodes are not asked for nonsense")

import comfy.model_management
import torch
from comfy_api.latest import io

from profusion.problems import printable

TEXTS = {
    "surrogate": "cup\ud800",
    "null": "x\0y",
    "escape": "\x1b[2J",
    "turned": "\u202egnp",
    "none": None,
    "list": ["a"],
}


@pytest.fixture(scope="module")
def guarding(pack):
    return sys.modules[f"{pack.__name__}.nodes.host.guarding"]


@pytest.fixture(scope="module")
def nodes(pack):
    return sys.modules[f"{pack.__name__}.nodes"].NODES


def plausible(one) -> object:
    """Something that passes for an input, as long as nobody looks closer."""
    kind = one.get_io_type()
    if kind in ("STRING", "COMBO"):
        return "x"
    if kind in ("INT", "FLOAT", "BOOLEAN"):
        return 1
    return {"samples": torch.zeros(1, 4, 2, 2)} if kind == "LATENT" else object()


def cases(nodes, kinds):
    """(node, all of its inputs, the one to be spoilt) for each input of these kinds."""
    for node in nodes:
        inputs = node.define_schema().inputs
        for one in inputs:
            if (one.get_io_type() in kinds) if kinds else one.get_io_type() not in PLAIN:
                yield node, {other.id: plausible(other) for other in inputs}, one


PLAIN = ("STRING", "COMBO", "INT", "FLOAT", "BOOLEAN")


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_every_text_of_every_node_is_looked_at_first(nodes, guarding, text):
    seen = 0
    for node, values, one in cases(nodes, ("STRING", "COMBO")):
        if one.optional and text is None:
            continue
        with pytest.raises(guarding.InputError, match=f"^{one.id} ") as caught:
            node.execute(**{**values, one.id: text})
        str(caught.value).encode()
        seen += 1
    assert seen > 20


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", None, [1]], ids=str)
def test_every_number_is_one(nodes, guarding, value):
    seen = 0
    for node, values, one in cases(nodes, ("INT", "FLOAT", "BOOLEAN")):
        if one.optional and value is None:
            continue
        with pytest.raises(guarding.InputError, match=f"^{one.id} is"):
            node.execute(**{**values, one.id: value})
        seen += 1
    assert seen > 40


@pytest.mark.parametrize("value", ["x", 5, 0.5, True, None], ids=str)
def test_what_must_be_connected_is(nodes, guarding, value):
    seen = 0
    for node, values, one in cases(nodes, ()):
        if value is None and (one.optional or one.get_io_type() in ("CLIP", "VAE", "CLIP_VISION")):
            continue
        with pytest.raises(guarding.InputError, match=f"^{one.id} is .*connect a node that gives"):
            node.execute(**{**values, one.id: value})
        seen += 1
    assert seen > 20


@pytest.mark.parametrize("value", [{}, {"dtype": "U8"}, [[[[]]]], [], (1,)], ids=str)
def test_what_comes_over_the_api_is_no_object(nodes, guarding, value):
    seen = 0
    for node, values, one in cases(nodes, ()):
        kind = one.get_io_type()
        if kind in ("IMAGE", "MASK") and isinstance(value, list):
            continue  # a list of them
        if isinstance(value, {"LATENT": dict, "CONDITIONING": (list, tuple)}.get(kind, ())) and not value:
            continue
        with pytest.raises(guarding.InputError, match=f"^{one.id} (is|has) .*connect a node that gives"):
            node.execute(**{**values, one.id: value})
        seen += 1
    assert seen > 20


def test_a_conditioning_has_prompts(guarding):
    for value in ([[]], [["x", {}]], [[torch.zeros(1, 2, 3)]], [torch.zeros(2)], "x"):
        with pytest.raises(guarding.InputError, match="^positive (has no prompt|is)"):
            guarding.check_inputs([io.Conditioning.Input("positive")], {"positive": value})
    guarding.check_inputs([io.Conditioning.Input("positive")], {"positive": [[torch.zeros(1, 2, 3), {}]]})


def test_a_latent_has_latents(guarding):
    for value in ({}, {"samples": "x"}, object()):
        with pytest.raises(guarding.InputError, match="^latent has no latents"):
            guarding.check_inputs([io.Latent.Input("latent")], {"latent": value})


def test_a_text_has_an_end(guarding):
    with pytest.raises(guarding.InputError, match="text has 200,000 characters: give at most 100,000"):
        guarding.check_inputs([io.String.Input("text")], {"text": "cat " * 50_000})
    guarding.check_inputs([io.String.Input("text")], {"text": "猫\n" * 50_000})


def failing(guarding, raise_it):
    class Failing(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema("Failing", inputs=[io.Int.Input("number")], outputs=[])

        @classmethod
        def execute(cls, number):
            raise_it()

    return guarding.guarded(Failing)


def raised(problem):
    def raise_it():
        try:
            raise ValueError("first")
        except ValueError as first:
            raise problem from first

    return raise_it


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (ValueError("'/models/cup\ud800' could not be saved"), r"'/models/cup\\ud800' could not be saved"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "Lower batch_size"),
        (MemoryError(), "Lower batch_size"),
    ],
)
def test_what_cannot_be_shown_is_put_into_words(guarding, problem, words):
    with pytest.raises(guarding.InputError, match=words) as caught:
        failing(guarding, raised(problem)).execute(1)
    assert any(frame.name == "raise_it" for frame in caught.traceback), "where it happened is lost"
    log = logged(caught.value)
    assert f"{type(problem).__name__}: {printable(str(problem))}".rstrip(": ") in log and "ValueError: first" in log


def logged(problem):
    """What the host's log gets of it, which must take it."""
    log = "".join(traceback.format_exception(problem))
    assert printable(log) == log
    return log


def test_a_cause_that_cannot_be_shown_is_in_the_log_in_other_letters(guarding):
    def raise_it():
        try:
            raise OSError("cup\ud800")
        except OSError as first:
            raise ValueError("not saved") from first

    with pytest.raises(guarding.InputError, match="^not saved$") as caught:
        failing(guarding, raise_it).execute(1)
    assert "OSError: cup\\ud800" in logged(caught.value) and "ValueError: not saved" in logged(caught.value)


def test_causes_that_go_round_in_a_circle_have_an_end(guarding):
    one, two = ValueError("cup\ud800"), ValueError("two")
    one.__cause__, two.__cause__ = two, one
    assert "two" in logged(guarding.loggable(one))


def test_other_exceptions_pass_as_they_are(guarding):
    for problem in (
        TypeError("a fault of ours, in plain words"),
        comfy.model_management.InterruptProcessingException(),
    ):
        with pytest.raises(type(problem)) as caught:
            failing(guarding, raised(problem)).execute(1)
        assert caught.value is problem


# A device whose memory ran out


def shortages():
    """What libraries and the pack itself raise then, each with what must be shown."""
    ours = "Memory ran out. Lower batch_size or the pictures' size, or close other programs."
    yield torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), ours
    yield torch.cuda.OutOfMemoryError("Allocation on device"), ours
    if hasattr(torch, "AcceleratorError"):
        yield torch.AcceleratorError("CUDA error: out of memory"), ours
        yield accelerator_error(2), ours


def accelerator_error(number):
    problem = torch.AcceleratorError("CUDA error: something")
    problem.error_code = number
    return problem


@pytest.fixture
def run_in_host(guarding, monkeypatch):
    """Run a node that raises, by the host's executor: what is shown, and whether the host unloaded its models."""
    import asyncio
    import uuid

    import execution
    from executor import prompt_executor

    import nodes

    unloaded = []
    monkeypatch.setattr(comfy.model_management, "unload_all_models", lambda: unloaded.append(True))
    monkeypatch.setattr(comfy.model_management, "debug_memory_summary", lambda: "", raising=False)

    def run(problem):
        unloaded.clear()
        node = failing(guarding, raised(problem))
        node.define_schema = classmethod(
            lambda cls: io.Schema("Failing", inputs=[io.Int.Input("number")], outputs=[], is_output_node=True)
        )
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "Failing", node)
        prompt, executor = {"1": {"class_type": "Failing", "inputs": {"number": 1}}}, prompt_executor()
        valid, error, outputs, _ = asyncio.run(execution.validate_prompt("failing", prompt, None))
        assert valid, error
        executor.execute(prompt, str(uuid.uuid4()), execute_outputs=outputs)
        (shown,) = [told["exception_message"] for _, told in executor.status_messages if "exception_message" in told]
        return shown, bool(unloaded)

    return run


@pytest.mark.parametrize(("problem", "words"), list(shortages()), ids=lambda value: str(value)[:40])
def test_the_host_unloads_its_models_and_the_person_reads_one_sentence(run_in_host, guarding, problem, words):
    shown, unloaded = run_in_host(problem)
    assert unloaded and shown.startswith(words + "\n") and "allocate" not in shown and "CUDA error" not in shown
    training = type("TrainingError", (guarding.Explained, RuntimeError), {})(
        "lower batch_size\nWhat was learned is kept"
    )
    training.__cause__ = problem
    node = failing(guarding, lambda: (_ for _ in ()).throw(training))
    with pytest.raises(torch.cuda.OutOfMemoryError, match="^lower batch_size\nWhat was learned is kept$") as caught:
        node.execute(1)
    assert caught.value.__cause__ is training


def test_no_other_failure_unloads_the_models(run_in_host):
    problems = [ValueError("x"), RuntimeError("can't allocate memory")]
    problems += [accelerator_error(209)] if hasattr(torch, "AcceleratorError") else []
    assert not any(run_in_host(problem)[1] for problem in problems)


def test_the_host_finds_the_same_nodes_and_signatures(nodes):
    import inspect

    for node in nodes:
        named = {one.id for one in node.define_schema().inputs}
        takes = inspect.signature(node.execute).parameters
        rest = any(one.kind is one.VAR_KEYWORD for one in takes.values())
        assert {name for name, one in takes.items() if one.kind is not one.VAR_KEYWORD} <= named
        assert rest or named <= set(takes)


@pytest.fixture
def files(pack, tmp_path, monkeypatch):
    """nodes/host/files.py over an empty models folder."""
    import folder_paths

    module = sys.modules[f"{pack.__name__}.nodes.host.files"]
    for kind in ("profusion_residuals", "profusion_promptnets", "loras"):
        (tmp_path / kind).mkdir()
        entry = ([str(tmp_path / kind)], {".safetensors", ".bin"})
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, entry)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return types.SimpleNamespace(folder=tmp_path, **vars(module))


@pytest.mark.parametrize(
    "name", [None, 5, [], {}, "", "cup\ud800", "a\0b", "<b>.safetensors", "../x", "x" * 5000, "猫"]
)
def test_a_loader_says_what_is_wrong_with_any_name(files, name):
    for find in (files.find_residual, files.find_promptnet):
        with pytest.raises(ValueError, match="There (can be|is) no") as caught:
            find(name)
        assert "must not leave" not in str(caught.value)
        said = files.why_not_found(find, name)
        assert said is True if name is None else said.isascii() or "猫" in said
        assert files.fingerprint(find, name) == "missing"


def test_a_file_whose_name_is_markup_is_not_listed_nor_loaded(files):
    """Older frontends put the entries of a loader's menu into the page as HTML."""
    name = "<img src=x onerror=alert(1)>.safetensors"
    for kind, names, find in (
        ("profusion_residuals", files.residual_names, files.find_residual),
        ("profusion_promptnets", files.promptnet_names, files.find_promptnet),
    ):
        for one in (name, "cat.safetensors", "a\udcff.safetensors"):
            (files.folder / kind / one).write_bytes(b"")
        assert [one for one in names() if one != files.TOYBOX] == ["cat.safetensors"]
        with pytest.raises(ValueError, match="renamed without <"):
            find(name)


@pytest.mark.parametrize(
    "prefix",
    [
        "x\0y",
        "cup\ud800",
        "a<b",
        "a:b",
        "C:x",
        "con/cat",
        "cat./x",
        "cat /x",
        "a?b",
        "a|b",
        'a"b',
        "a*b",
        "a\nb",
        "/x",
        "../x",
        "a/../x",
        "..",
        ".",
        "",
        " ",
        "\\\\server\\x",
        "a\\..\\..\\x",
        "aux\\b",
        "\u202egpj",
    ],
)
def test_a_prefix_that_some_system_refuses_is_refused_on_all(files, prefix):
    for next_path in (lambda: files.next_residual_path(prefix, "cat"), lambda: free_path(files, "loras", prefix)):
        with pytest.raises(ValueError, match="^filename_prefix ") as caught:
            next_path()
        assert str(caught.value).isprintable()
    assert not any((files.folder / "loras").rglob("*.safetensors"))


def free_path(files, folder, prefix):
    """Where a file with this prefix would be saved."""
    return files.save_numbered(folder, prefix, lambda path: path)


def test_a_backslash_is_a_subfolder_on_every_system(files):
    path = files.next_residual_path("pets\\cat", "cat")
    assert path == files.folder / "profusion_residuals" / "pets" / "cat_00001_.safetensors"
    assert files.next_residual_path("%noun%", "con").name == "con_00001_.safetensors"


def test_a_link_out_of_the_folder_is_named(files, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (files.folder / "loras" / "link").symlink_to(tmp_path / "elsewhere")
    link = files.folder / "loras" / "link"
    try:
        path = free_path(files, "loras", "link/x")
    except ValueError as problem:  # newer hosts
        assert "'link/x'" in str(problem) and "no link leads out" in str(problem)
    else:  # older ones follow the links of the folder's owner
        assert path == link / "x_00001_.safetensors"


def test_markup_is_told_to_the_frontend_as_text(pack, monkeypatch):
    display = sys.modules[f"{pack.__name__}.nodes.host.display"]
    told = []
    server = types.SimpleNamespace(send_progress_text=lambda text, number: told.append(text))
    stand_in = types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=server))
    monkeypatch.setitem(sys.modules, "server", stand_in)
    node = types.SimpleNamespace(hidden=types.SimpleNamespace(unique_id="1"))
    ui = display.show(node, "/models/<img src=x>/cat & co\ud800")
    (text,) = told
    assert text.replace("\u2060", "") == r"/models/<img src=x>/cat & co\ud800" == ui["text"][0]
    assert "<img" not in text
