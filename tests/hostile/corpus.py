"""Hostile files and valid ones, made by seed: nothing here is copied from anywhere, and what would run only leaves a mark.

    for case in hostile(seed=0): case.write(folder)

A case is a few files, the way a person would open them, and whether that must be refused. A payload that runs creates
the file CANARY where the process stands, which is the folder of the case.
"""

from __future__ import annotations

import json
import pickle
import random
import struct
import tarfile
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.hostile import raw
from weitiao.models import tiny
from weitiao.weights import gguf

CANARY = "CANARY"
REFUSED, OPENED, EITHER = "refused", "opened", "either"  # EITHER: whatever is said, nothing may run


@dataclass(frozen=True)
class Case:
    """Files of one folder by name (bytes, or where a link leads), how they are opened, what must come of it."""

    name: str
    files: dict[str, bytes | Path]
    how: str  # a key of soak.OPENERS
    wanted: str = REFUSED
    opened: str = ""  # the file that is opened; "" is the folder
    notes: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """The files in ``folder``; what is to be opened."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                path.symlink_to(content)
            else:
                path.write_bytes(content)
        return folder / self.opened if self.opened else folder


# ---- pickles ---------------------------------------------------------------------------------------------------------

GADGETS = """
os.system posix.system nt.system os.popen os.execv os.execl os.spawnv os.spawnl os.posix_spawn os.remove os.rename
os.putenv os.kill os._exit os.abort os.fork os.startfile subprocess.Popen subprocess.run subprocess.call
subprocess.check_output subprocess.getoutput subprocess.check_call builtins.eval builtins.exec builtins.open
builtins.compile builtins.getattr builtins.setattr builtins.__import__ builtins.globals builtins.vars builtins.type
builtins.map builtins.filter builtins.input builtins.breakpoint builtins.print __builtin__.eval __builtin__.exec
__builtin__.file io.open io.FileIO _io.FileIO _io.open codecs.open pathlib.Path.write_text shutil.rmtree shutil.move
shutil.copyfile pty.spawn runpy.run_path runpy._run_code runpy.run_module code.interact code.InteractiveInterpreter
codeop.compile_command pdb.run pdb.Pdb bdb.Bdb cProfile.run profile.run trace.Trace timeit.timeit timeit.main
importlib.import_module importlib.__import__ importlib.machinery.SourceFileLoader imp.load_source zipimport.zipimporter
pkgutil.get_loader pkgutil.resolve_name pydoc.locate pydoc.pipepager pydoc.render_doc doctest.debug_script
unittest.main ensurepip.bootstrap pip.main venv.create webbrowser.open socket.create_connection socket.socket
urllib.request.urlopen urllib.request.urlretrieve http.client.HTTPConnection ftplib.FTP smtplib.SMTP asyncio.run
asyncio.create_subprocess_shell multiprocessing.util.spawnv_passfds threading.Thread ctypes.CDLL ctypes.WinDLL
ctypes.util.find_library functools.partial functools.reduce operator.attrgetter operator.methodcaller
operator.itemgetter types.FunctionType types.CodeType types.MethodType marshal.loads pickle.loads pickle.load
_pickle.loads cloudpickle.loads dill.loads joblib.load shelve.open dbm.open sqlite3.connect logging.config.dictConfig
logging.config.fileConfig logging.FileHandler tempfile.mktemp tempfile.NamedTemporaryFile sys.setprofile sys.settrace
sys.modules atexit.register signal.signal weakref.finalize inspect.getattr_static linecache.getlines gc.get_objects
copyreg._reconstructor copyreg.add_extension _codecs.decode collections.namedtuple idlelib.pyshell.ModifiedInterpreter.runcode
lib2to3.pgen2.grammar.Grammar.loads lib2to3.pgen2.pgen.ParserGenerator test.support.script_helper.assert_python_ok
torch.load torch.hub.load torch.jit.load torch.ops.load_library torch.utils.cpp_extension.load_inline torch.compile
torch.serialization.load torch._C._cuda_init torch.fx.graph_module.reduce_graph_module torch.nn.Module
torch.storage._load_from_bytes torch.utils._config_module.load_config torch._dynamo.guards.GuardBuilder.get
torch.distributed.run.main torch.package.PackageImporter numpy.load numpy.testing._private.utils.runstring
numpy.f2py.crackfortran.myeval numpy.f2py.capi_maps.getinit numpy.fromfile numpy.memmap numpy.save
transformers.AutoModel.from_pretrained transformers.utils.hub.cached_file yaml.unsafe_load jinja2.Template
pandas.read_pickle pandas.eval scipy.io.loadmat sklearn.externals.joblib.load aiohttp.connector.TCPConnector
pathlib.PosixPath datetime.datetime decimal.Decimal random.Random uuid.UUID enum.Enum collections.deque
""".split()


def call(name: str, *values: Any, opcode: bytes = b"R") -> bytes:
    """A pickle of a table with one value, which is made by a call of ``name``."""
    module, _, attribute = name.rpartition(".")
    arguments = pickle.dumps(values, 2)[2:-1]
    return b"\x80\x02}X\x01\x00\x00\x00wc" + f"{module}\n{attribute}\n".encode() + arguments + opcode + b"s."


def argument(name: str) -> str:
    """What a gadget is given: a command, or a line of Python, that leaves the mark."""
    python = ("eval", "exec", "compile", "run", "runctx", "timeit", "runsource", "myeval", "runstring", "getinit")
    if name.rpartition(".")[2] in python:
        return "__import__('pathlib').Path('CANARY').touch()"
    return "touch CANARY"


def gadgets(draw: random.Random) -> Iterator[Case]:
    """Calls of what could run code, in every form of pickled file."""
    forms = ("x.bin", "x.pt", "x.pth", "x.ckpt")
    for name in GADGETS:
        pickled = call(name, argument(name), opcode=draw.choice((b"R", b"\x81")))
        stream = draw.random() < 0.3
        content = raw.torch_stream(pickled) if stream else raw.torch_zip(pickled)
        file = draw.choice(forms)
        yield Case(f"gadget {name}", {file: content}, draw.choice(("inspect", "convert")), opened=file)


def machines(draw: random.Random) -> Iterator[Case]:
    """Pickles that would confuse an interpreter: opcodes that no tensor needs, and needed ones on the wrong values."""
    table, weight = b"\x80\x02}", b"X\x01\x00\x00\x00w"
    system, mark = b"cposix\nsystem\n", b"X\x0c\x00\x00\x00touch CANARY"
    storage = pickle.dumps(("storage", "x", "0", "cpu", 4), 2)[2:-1]
    float_storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu%st"
    view = b"ctorch._utils\n_rebuild_tensor_v2\n(" + float_storage + b"Q%s%s%s\x89}tR"
    whole = lambda *values: view % tuple(pickle.dumps(value, 2)[2:-1] for value in values)  # noqa: E731
    pickles = {
        "SETITEM on a list (CVE-2026-24747)": b"\x80\x02]K\x00K\x01s.",
        "SETITEMS on a tuple": b"\x80\x02)(K\x00K\x01u.",
        "SETITEM on a tensor": table + weight + whole(4, 0, (4,), (1,)) + b"K\x00K\x01ss.",
        "a storage larger than its bytes (CVE-2026-24747)": table + weight + whole(1 << 40, 0, (4,), (1,)) + b"s.",
        "a view beyond its storage": table + weight + whole(4, 0, (400,), (1,)) + b"s.",
        "a view before its storage": table + weight + whole(4, -4, (4,), (1,)) + b"s.",
        "a negative stride": table + weight + whole(4, 3, (4,), (-1,)) + b"s.",
        "a huge view of one number": table + weight + whole(1, 0, (1 << 40,), (0,)) + b"s.",
        "a shape that overflows": table + weight + whole(4, 0, (1 << 33, 1 << 33), (0, 0)) + b"s.",
        "shape and strides of different lengths": table + weight + whole(4, 0, (2, 2), (1,)) + b"s.",
        "a shape of words": table + weight + whole(4, 0, ("a",), (1,)) + b"s.",
        "a bool as a shape": table + weight + whole(4, 0, (True,), (1,)) + b"s.",
        "a storage that is a text": table + weight + storage + b"Qs.",
        "a reference of no storage": table + weight + b"X\x01\x00\x00\x00aQs.", "INST": b"(S'touch'\niposix\nsystem\n.",
        "OBJ": b"(" + system + mark + b"o.", "NEWOBJ_EX": table + weight + system + mark + b"\x85}\x92s.",
        "PERSID": b"P0\n.", "EXT1": b"\x80\x02\x82\x01.", "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
        "BYTEARRAY8": b"\x80\x05\x96\x08" + bytes(15) + b".", "NEXT_BUFFER": b"\x80\x05\x97.", "DUP": b"\x80\x02}20.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + mark + b"\x85R.",
        "STACK_GLOBAL of numbers": b"\x80\x04K\x01K\x02\x93.", "a name in parts": b"\x80\x04\x8c\x02os\x8c\x0bpath.system\x93.",
        "a module with a dot name": b"\x80\x04\x8c\x08builtins\x8c\x0c__dict__.get\x93.",
        "BUILD on a class": b"\x80\x02ccollections\nOrderedDict\n}b.",
        "BUILD on a number": b"\x80\x02K\x01}b.", "a call of a table": b"\x80\x02})R.", "a call of a storage class":
        b"\x80\x02ctorch\nFloatStorage\n)R.", "a parameter of a number": call("torch._utils._rebuild_parameter", 1, True, {}),
        "rebuild by a gadget": call("torch._tensor._rebuild_from_type_v2", "os.system", "x", ("x",), {}),
        "a quantised tensor": call("torch._utils._rebuild_qtensor", 1, 2, 3), "a sparse tensor":
        call("torch._utils._rebuild_sparse_tensor", 1, 2), "bytes in UTF-7": call("_codecs.encode", "a", "utf-7"),
        "nothing": b"", "no end": b"\x80\x02}", "an empty stack": b"\x80\x02.", "a memo of nothing": b"\x80\x02h\x07.",
        "a mark of nothing": b"\x80\x02t.", "an unknown opcode": b"\x80\x02\xff.", "a number": b"\x80\x02K\x01.",
        "a pickle in a pickle": b"\x80\x02C\x04\x80\x02}.", "no tensors": b"\x80\x02}X\x01\x00\x00\x00aK\x01s.",
        "a table as a key": b"\x80\x02}}K\x01s.", "a text without end": b"\x80\x02X\xff\xff\xff\x7fa.",
        "bytes without end": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fa.", "a long without end": b"\x80\x02\x8b\xff\xff\xff\x7fa.",
        "a frame without end": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.", "digits without end": b"I" + b"9" * 100_000 + b"\n.",
        "a long of a megabyte": b"\x80\x02\x8b\x00\x00\x10\x00" + b"\x7f" * (1 << 20) + b".",
        "a million lists": b"\x80\x02(" + b"]" * 1_500_000 + b"l.", "keys that take for ever": b"\x80\x02})" + b"".join(
            b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(50)) + b"K\x01s.",
        "tables in tables": b"\x80\x02" + b"}X\x01\x00\x00\x00a" * 200_000 + b"K\x01" + b"s" * 200_000 + b".",
        "a text of two megabytes": b"\x80\x02}X\x00\x00\x20\x00" + b"a" * (2 << 20) + b"K\x01s.",
    }  # fmt: skip
    for name, pickled in pickles.items():
        for form in ("zip", "stream") if len(pickled) < 1 << 20 else (draw.choice(("zip", "stream")),):
            content = raw.torch_zip(pickled, {"0": bytes(16)}) if form == "zip" else raw.torch_stream(pickled)
            yield Case(f"pickle, {name} ({form})", {"x.bin": content}, "inspect", opened="x.bin")


def archives(draw: random.Random) -> Iterator[Case]:
    """Zip archives whose directory lies, and what is no archive of torch."""
    state = raw.saved({"w": torch.ones(8)})
    pickled = pickle.dumps({}, 2)
    zeros = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = zeros.compress(bytes(50 << 20)) + zeros.flush()
    lies: dict[str, dict[str, Any]] = {
        "compressed": {"method": 8}, "another method": {"method": 93}, "encrypted": {"flags": 1}, "sizes too large": {"size": 1},
        "sizes of gigabytes": {"size": 1 << 31}, "more entries than there are": {"count": 60_000}, "no entries": {"count": 0},
        "a directory elsewhere": {"offset": 7}, "a directory beyond": {"offset": 1 << 31}, "a long directory": {"length": 1 << 31},
        "a short directory": {"length": 10}, "something before": {"before": b"#!/bin/sh\ntouch CANARY\n"},
        "something behind": {"after": b"PK\3\4 and so on"}, "another name in the header": {"local": {"archive/data.pkl": "archive/data.pkx"}},
        "an entry on another": {"places": {"archive/byteorder": 0}}, "an entry beyond": {"places": {"archive/byteorder": 1 << 30}},
    }  # fmt: skip
    made = {f"archive, {name}": raw.torch_zip(pickled, **given) for name, given in lies.items()}
    names = (
        "../x",
        "/etc/passwd",
        "archive/../../x",
        "C:\\x",
        "archive\\x",
        "archive//x",
        "archive/./x",
        "",
        "archive/\n",
        "x" * 600,
    )
    for name in names:
        made[f"archive, a name {name[:20]!r}"] = raw.zipped([("archive/data.pkl", pickled), (name, b"x")])
    twice = [("archive/data.pkl", pickled), ("archive/data.pkl", call("os.system", "touch CANARY"))]
    made["archive, an entry twice"] = raw.zipped(twice)
    made["archive, two folders"] = raw.zipped([("a/data.pkl", pickled), ("b/data.pkl", pickled)])
    made["archive, no data.pkl"] = raw.zipped([("archive/x", b"")])
    made["archive, big-endian"] = raw.zipped([("archive/data.pkl", pickled), ("archive/byteorder", b"big")])
    made["archive, a bomb"] = raw.torch_zip(pickled, method=8, packed={"archive/data.pkl": bomb})
    script = raw.torch_zip(pickled, {"x": b""}).replace(b"archive/data/x", b"archive/code/x")
    made["archive, TorchScript"] = script
    tar = BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as file:
        info = tarfile.TarInfo("pickle")
        info.size = len(evil := call("os.system", "touch CANARY"))
        file.addfile(info, BytesIO(evil))
    made["tar of old (CVE-2025-32434)"] = tar.getvalue()
    stream = raw.saved({"w": torch.ones(8)}, _use_new_zipfile_serialization=False)
    made["stream, more behind it"] = stream + b"x"
    made["stream, a storage of another size"] = stream.replace(struct.pack("<q", 8), struct.pack("<q", 1 << 40))
    made["a plain pickle"] = call("os.system", "touch CANARY")
    for name, start in (("7z", b"7z\xbc\xaf\x27\x1c"), ("gzip", b"\x1f\x8b"), ("HDF5", b"\x89HDF\r\n"), ("a program", b"\x7fELF"),
                        ("a script", b"#!/bin/sh\ntouch CANARY\n"), ("a page", b"<html>"), ("nothing", b""),
                        ("GGML of old", b"ggjt"), ("npy", b"\x93NUMPY"), ("zeros", bytes(64))):  # fmt: skip
        made[f"another file, {name}"] = start + bytes(draw.randrange(256) for _ in range(100 if start else 0))
    made |= {f"archive, cut at {place}": state[:place] for place in draw.sample(range(1, len(state)), 12)}
    made |= {f"stream, cut at {place}": stream[:place] for place in draw.sample(range(1, len(stream)), 8)}
    for name, content in made.items():
        yield Case(name, {"x.bin": content}, "inspect", opened="x.bin")


# ---- headers ---------------------------------------------------------------------------------------------------------


def headers(draw: random.Random) -> Iterator[Case]:
    """safetensors whose header lies."""

    def one(**values: Any) -> dict[str, Any]:
        return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | values

    wrong: dict[str, Any] = {
        "too long": one(data_offsets=[0, 1 << 40], shape=[1 << 38]), "backwards": one(data_offsets=[8, 0]),
        "negative": one(data_offsets=[-8, 0]), "negative shape": one(shape=[-2]), "a shape of floats": one(shape=[2.0]),
        "a shape of texts": one(shape=["2"]), "a shape of lists": one(shape=[[2]]), "a null shape": one(shape=None),
        "a huge shape": one(shape=[1 << 62, 4]), "a hundred sides": one(shape=[1] * 100 + [2]), "an unknown type": one(dtype="Q9"),
        "a list as type": one(dtype=["F32"]), "three offsets": one(data_offsets=[0, 4, 8]), "no offsets": {"dtype": "F32", "shape": [2]},
        "a true offset": one(data_offsets=[False, 8]), "an infinite shape": one(shape=[float("inf")]), "a number": 7, "null": None,
        "another size": one(shape=[3]), "a gap": one(data_offsets=[8, 16]), "an offset of 10^4000": one(data_offsets=[0, 10**4000]),
    }  # fmt: skip
    made = {name: raw.safetensors({"a": entry}, bytes(8)) for name, entry in wrong.items()}
    both = {"a": one(), "b": one(data_offsets=[4, 12])}
    made["overlapping"] = raw.safetensors(both, bytes(12))
    made["the same bytes twice"] = raw.safetensors({"a": one(), "b": one()}, bytes(8))
    made["a name twice"] = raw.safetensors(
        b'{"a":' + json.dumps(one()).encode() + b',"a":' + json.dumps(one()).encode() + b"}", bytes(8)
    )
    made["more behind"] = raw.safetensors({"a": one()}, bytes(9))
    made["metadata that is a list"] = raw.safetensors({"__metadata__": [1], "a": one()}, bytes(8))
    made["metadata of numbers"] = raw.safetensors({"__metadata__": {"a": 1}, "a": one()}, bytes(8))
    for length in (0, 1, 7, 1 << 20, 99_999_999, 100_000_001, 1 << 31, 1 << 62, (1 << 64) - 1):
        made[f"a header said to be {length} long"] = raw.safetensors({"a": one()}, bytes(8), length=length)
    texts = {"no JSON": b"not json", "brackets": b"[" * 100_000, "objects": b'{"a":' * 50_000, "a list": b"[1]", "UTF-16": '{"a":1}'.encode("utf-16"),
             "bad UTF-8": b'{"\xff\xfe": 1}', "NaN": b"NaN", "lists without number": b'{"a":[' + b"[]," * 3_000_000 + b"[]]}",
             "names without number": b"{" + b",".join(b'"%d":0' % n for n in range(1_500_000)) + b"}"}  # fmt: skip
    empty = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    texts["600,000 empty tensors"] = b"{" + b",".join(b'"%d":%s' % (n, empty) for n in range(600_000)) + b"}"
    made |= {name: raw.safetensors(text) for name, text in texts.items()}
    good = raw.safetensors({"a": one()}, bytes(8))
    made |= {f"cut at {place}": good[:place] for place in draw.sample(range(1, len(good)), 8)}
    made["a git-lfs pointer"] = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for name, content in made.items():
        yield Case(f"safetensors, {name}", {"x.safetensors": content}, "inspect", opened="x.safetensors")


def ggufs(draw: random.Random) -> Iterator[Case]:
    """GGUF whose counts and lengths lie (after CVE-2025-53630 and CVE-2026-27940, and what a reader would allocate)."""
    tensor = {"w": ("F32", (2, 4), bytes(32))}
    values = {"general.architecture": "llama", "tokens": ["a", "b"]}
    build = raw.gguf_file
    array = lambda kind, count: struct.pack("<IIQ", gguf.ARRAY, kind, count)  # noqa: E731
    made: dict[str, bytes] = {}
    for count in (1 << 17, 1 << 31, 1 << 40, 1 << 62, (1 << 64) - 1):
        made[f"{count} tensors"] = build(values, tensor, count=count)
        made[f"{count} keys"] = build(values, tensor, keys=count)
        made[f"an array of {count} numbers"] = build({"a": array(4, count)}, tensor)
        made[f"an array of {count} texts"] = build({"a": array(gguf.TEXT, count)}, tensor)
        made[f"a text of {count} bytes"] = build({"a": struct.pack("<I", gguf.TEXT) + raw.text("a", count)}, tensor)
        made[f"a side of {count}"] = build(values, tensor, dimensions={"w": (count, 4)})
        made[f"data at {count}"] = build(values, tensor, offsets={"w": count // 32 * 32})
    deep = b"".join(struct.pack("<IQ", gguf.ARRAY, 1) for _ in range(50_000))
    made["arrays in arrays"] = build({"a": struct.pack("<I", gguf.ARRAY) + deep}, tensor)
    made |= {f"version {number}": build(values, tensor, version=number) for number in (0, 1, 4, 0x03000000)}
    made |= {f"type {number}": build(values, tensor, kinds={"w": number}) for number in (4, 5, 31, 99, 1 << 31)}
    made |= {f"{count} sides": build(values, tensor, dimensions={"w": (1,) * count}) for count in (5, 64, 1000)}
    made |= {
        f"a value of type {kind}": build({"a": struct.pack("<I", kind) + bytes(8)}, tensor)
        for kind in (13, 99, 1 << 31)
    }
    made |= {f"alignment {number}": build({"general.alignment": number}, tensor) for number in (0, 1, 7, 1 << 20)}
    made["alignment of words"] = build({"general.alignment": "a"}, tensor)
    made["data askew"] = build(values, tensor, offsets={"w": 1})
    made["data on data"] = build(values, tensor | {"v": ("F32", (2, 4), bytes(32))}, offsets={"v": 0})
    made["half a block"] = build(values, {"w": ("Q4_K", (2, 128), bytes(144))})
    made["a key twice"] = build(values, tensor, keys=3)[:24] + b"".join(raw.text("k") + raw.value(1) for _ in range(3))
    whole = build(values, tensor)
    made |= {f"cut at {place}": whole[:place] for place in draw.sample(range(4, len(whole)), 10)}
    for name, content in made.items():
        yield Case(f"GGUF, {name}", {"x.gguf": content}, draw.choice(("inspect", "convert")), opened="x.gguf")


# ---- folders ---------------------------------------------------------------------------------------------------------


def folder_of(family: str = "llama") -> dict[str, bytes | Path]:
    """The files of a tiny model."""
    with tempfile.TemporaryDirectory() as place:
        tiny.make(family, Path(place) / "m")
        return {file.name: file.read_bytes() for file in sorted((Path(place) / "m").iterdir()) if file.is_file()}


def edited(files: dict[str, bytes | Path], name: str, **values: Any) -> dict[str, bytes | Path]:
    """The files with other values in one of them."""
    old = files.get(name, b"{}")
    assert isinstance(old, bytes)
    return files | {name: json.dumps(json.loads(old) | values).encode()}


def configurations(draw: random.Random) -> Iterator[Case]:
    """Model folders whose config.json, index, links or code would lead elsewhere."""
    base = folder_of()
    evil = b"open('CANARY', 'w')\n"
    for key in (
        "_attn_implementation_internal",
        "_attn_implementation",
        "attn_implementation",
        "_experts_implementation",
    ):
        for value in ("someone/kernels", "someone/kernels:evil.run", {"": "someone/kernels@main"}):
            yield Case(f"config, {key}={value}", edited(base, "config.json", **{key: value}), "load")
    yield Case(
        "config, a kernel within", edited(base, "config.json", text_config={"attn_implementation": "a/b"}), "load"
    )
    for kind in ("evil", "../evil", "llama/../evil", "chatglm", ["llama"], {"a": 1}, None, 7):
        values = {
            "model_type": kind,
            "auto_map": {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"},
        }
        files = edited(base, "config.json", **values) | {"modeling_evil.py": evil, "configuration_evil.py": evil}
        yield Case(f"config, model_type {kind}", files, "load")
    sizes: dict[str, Any] = {
        "num_hidden_layers": 1 << 40,
        "hidden_size": -1,
        "vocab_size": 0,
        "num_attention_heads": "many",
    }
    for key, value in (sizes | {"quantization_config": {"quant_method": "evil"}, "hidden_size ": 1}).items():
        if key.strip() == key:
            yield Case(f"config, {key}={value}", edited(base, "config.json", **{key: value}), "load")
    texts = {"no JSON": b"{", "a list": b"[]", "brackets": b'{"a":' + b"[" * 100_000, "lists": b'{"a":[' + b"[]," * 4_000_000 + b"0]}",
             "17 MiB": b" " * (17 << 20), "UTF-16": b"\xff\xfe{\0}\0", "digits": b'{"a":' + b"9" * 100_000 + b"}", "nothing": b""}  # fmt: skip
    for name, text in texts.items():
        yield Case(f"config, {name}", base | {"config.json": text}, "load")
    nested: Any = {}
    for _ in range(300):
        nested = {"a": nested}
    yield Case("config, nested", edited(base, "config.json", text_config=nested), "load")
    weights = base["model.safetensors"]
    rest = {name: content for name, content in base.items() if name != "model.safetensors"}
    for name in (
        "../out.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        ".",
        "",
        "C:\\x",
        "a\\..\\b",
        "~/x",
        "x\0y",
    ):
        index = json.dumps({"weight_map": {"lm_head.weight": name}}).encode()
        for file in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
            yield Case(f"index, {name!r} in {file}", rest | {file: index}, "load")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json"):
        for target in ("/etc/passwd", "../../secret", "/proc/self/environ"):
            yield Case(f"link, {name} to {target}", {**base, name: Path(target)}, "load")
    for file in ("pytorch_model.bin",):
        for name in draw.sample(GADGETS, 6):
            yield Case(f"folder with gadget {name}", rest | {file: raw.torch_zip(call(name, argument(name)))}, "load")
    code = {name: evil for name in ("modeling_llama.py", "configuration_llama.py", "tokenization_llama.py", "custom_generate/generate.py",
                                    "__init__.py", "conftest.py", "sitecustomize.py", "setup.py", "modeling_evil.py")}  # fmt: skip
    remote = {
        "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "other/repo--modeling_evil.Evil"},
        "trust_remote_code": True,
    }
    yield Case("code beside known classes", edited(base, "config.json", **remote) | code, "load", EITHER)
    own = edited(
        base, "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_evil.Evil", None]}, tokenizer_class="Evil"
    )
    yield Case("code of a tokenizer", own | code, "tokenizer", EITHER)
    without = {name: content for name, content in own.items() if name != "tokenizer.json"}
    yield Case("code of a tokenizer without a file", without | code, "tokenizer")
    assert isinstance(weights, bytes)
    yield Case("a folder cut short", base | {"model.safetensors": weights[:-4]}, "load")


def tokenizers(draw: random.Random) -> Iterator[Case]:
    """tokenizer.json and its neighbours."""
    base = folder_of()
    text = base["tokenizer.json"]
    assert isinstance(text, bytes)
    values = json.loads(text)
    model = values["model"]
    split = lambda pattern: {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}  # noqa: E731
    replace = lambda content: {"type": "Replace", "pattern": {"String": "a"}, "content": content}  # noqa: E731
    token = {
        "id": 0,
        "content": "x",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    nested: Any = {"type": "Lowercase"}
    for _ in range(120):
        nested = {"type": "Sequence", "normalizers": [nested]}
    pad = {"direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "x", "pad_to_multiple_of": None}
    wrong: dict[str, Any] = {
        "padding to 10^9": {"padding": pad | {"strategy": {"Fixed": 10**9}}}, "padding to -1": {"padding": pad | {"strategy": {"Fixed": -1}}},
        "padding to multiples of 10^9": {"padding": pad | {"strategy": "BatchLongest", "pad_to_multiple_of": 10**9}},
        "cut to 10^12": {"truncation": {"max_length": 10**12, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}},
        "(a+)+": {"pre_tokenizer": split("(a+)+$")}, "(.*)*": {"pre_tokenizer": split("(.*)*x")}, "(a|a)+ in +": {"normalizer": replace("b") | {"pattern": {"Regex": "(x+x+)+y"}}},
        "a long pattern": {"pre_tokenizer": split("a|" * 20_000)}, "growing": {"normalizer": {"type": "Sequence", "normalizers": [replace("a" * 1000)] * 3}},
        "a megabyte for a letter": {"normalizer": replace("a" * (1 << 20))}, "nested": {"normalizer": nested},
        "an id of 2^40": {"added_tokens": [token | {"id": 1 << 40}]}, "a negative id": {"added_tokens": [token | {"id": -1}]},
        "tokens that are texts": {"added_tokens": ["x"]}, "tokens that are a table": {"added_tokens": {"a": 1}},
        "an id of words": {"model": model | {"vocab": {"a": "b"}}}, "ids of 2^63": {"model": model | {"vocab": {"a": 1 << 63}}},
        "no model": {"model": None}, "a model that is a list": {"model": []},
        "words of 10^12": {"model": model | {"max_input_chars_per_word": 10**12}}, "an unknown model": {"model": {"type": "Evil"}},
        "a template of 10^5 parts": {"post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 100_000, "pair": [], "special_tokens": {}}},
    }  # fmt: skip
    for name, value in wrong.items():
        yield Case(
            f"tokenizer.json, {name}", base | {"tokenizer.json": json.dumps(values | value).encode()}, "tokenizer"
        )
    texts = {"no JSON": b"{", "a list": b"[]", "brackets": b'{"model":' + b"[" * 200_000, "lists": b'{"model":[' + b"[]," * 4_000_000 + b"0]}",
             "too large": b" " * ((128 << 20) + 1)}  # fmt: skip
    for name, content in texts.items():
        yield Case(f"tokenizer.json, {name}", base | {"tokenizer.json": content}, "tokenizer")
    for key, value in (("fast_tokenizer_files", ["../tokenizer.9.json"]), ("vocab_file", "../../etc/passwd"), ("added_tokens_decoder", {"-1": {}}),
                       ("added_tokens_decoder", {"9" * 30: {}}), ("added_tokens_decoder", ["a"])):  # fmt: skip
        yield Case(
            f"tokenizer_config.json, {key}={value}", edited(base, "tokenizer_config.json", **{key: value}), "tokenizer"
        )
    rest = {name: content for name, content in base.items() if name != "tokenizer.json"}
    for _ in range(6):
        content = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 2000)))
        yield Case(f"tokenizer.model, {len(content)} random bytes", rest | {"tokenizer.model": content}, "tokenizer")


def templates(draw: random.Random) -> Iterator[Case]:
    """Chat templates that run on, fill the memory, or try to get out."""
    from tests.data.test_sandbox import BAD

    base = folder_of()
    way_out = (
        "{{ self._TemplateReference__context.environment }}", "{{ ''|attr('__class__') }}", "{{ '{a.__class__}'.format_map({'a': 1}) }}",
        "{{ range.__self__ }}", "{{ lipsum.__globals__ }}", "{{ cycler.__init__.__globals__.os.popen('touch CANARY') }}",
        "{{ joiner.__init__ }}", "{{ dict.__subclasses__() }}", "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ namespace(a=1).__class__.__mro__ }}", "{{ ((''|string).format).__globals__ }}", "{{ raise_exception.__closure__ }}",
        "{% set x = namespace() %}{% set x.__class__ = 1 %}", "{{ messages.append({}) }}", "{{ messages[0].update({'role': 'x'}) }}",
        "{% macro m() %}{{ m.__globals__ }}{% endmacro %}{{ m() }}", "{{ strftime_now.__self__ }}", "{{ {}.__class__.__bases__ }}",
    )  # fmt: skip
    for name, text in BAD.items():
        yield Case(f"template, {name}", base | {"chat_template.jinja": text.encode()}, "render")
    for text in way_out:
        yield Case(f"template, {text[:60]}", base | {"chat_template.jinja": text.encode()}, "render", EITHER)


def adapters(draw: random.Random) -> Iterator[Case]:
    """Adapter folders whose description would import, or run on."""
    base = {"peft_type": "LORA", "base_model_name_or_path": "weitiao-tiny-zh", "r": 4, "target_modules": ["q_proj"]}
    weights = raw.safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4))
    for name, values in {
        "megatron": {"megatron_config": {"a": 1}, "megatron_core": "evil"}, "a pattern": {"target_modules": "(.*)*x"},
        "a pattern of ranks": {"rank_pattern": {"(a+)+$": 4}}, "no kind": {"peft_type": None}, "another kind": {"peft_type": "EVIL"},
        "no base": {"base_model_name_or_path": None}, "a base outside": {"base_model_name_or_path": "../../../nothing/here"},
        "a base that is a command": {"base_model_name_or_path": "; touch CANARY"},
    }.items():  # fmt: skip
        files = {"adapter_config.json": json.dumps(base | values).encode(), "adapter_model.safetensors": weights}
        yield Case(f"adapter, {name}", files, "open")
    pickled = raw.torch_zip(call("os.system", "touch CANARY"))
    yield Case(
        "adapter, a pickle", {"adapter_config.json": json.dumps(base).encode(), "adapter_model.bin": pickled}, "open"
    )
    cut = {"adapter_config.json": json.dumps(base).encode(), "adapter_model.safetensors": weights[:-1]}
    yield Case("adapter, cut", cut, "open")


HOSTILE: tuple[Callable[[random.Random], Iterator[Case]], ...] = (
    gadgets, machines, archives, headers, ggufs, configurations, tokenizers, templates, adapters,
)  # fmt: skip


def hostile(seed: int) -> list[Case]:
    """Every hostile case, in an order that depends on nothing but the seed."""
    return [case for make in HOSTILE for case in make(random.Random(f"{seed} {make.__name__}"))]


# ---- valid files -----------------------------------------------------------------------------------------------------


def _state(draw: random.Random) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    kinds = [
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int64,
        torch.uint8,
        torch.bool,
        torch.int32,
    ]
    state: dict[str, Any] = OrderedDict()
    for number in range(draw.randrange(1, 12)):
        shape = [draw.randrange(0, 9) for _ in range(draw.randrange(0, 4))]
        tensor = torch.randn(shape, generator=generator).to(draw.choice(kinds))
        if draw.random() < 0.2 and tensor.ndim > 1:
            tensor = tensor.transpose(0, 1)
        if draw.random() < 0.2 and tensor.is_floating_point():
            tensor = torch.nn.Parameter(tensor)
        state[draw.choice(("层", "layers.", "модель.", "a b ")) + str(number)] = tensor
    if draw.random() < 0.3:
        state["tied"] = next(iter(state.values()))
    return state


def valid(seed: int) -> list[Case]:
    """Files as programs write them: all of these must open."""
    draw, made = random.Random(f"{seed} valid"), []

    def add(name: str, file: str, content: bytes, how: str = "convert") -> None:
        made.append(Case(f"valid, {name}", {file: content}, how, OPENED, file))

    for number in range(16):
        add(f"torch.save {number}", draw.choice(("x.bin", "x.pt", "x.pth")), raw.saved(_state(draw)))
        add(f"torch.save of old {number}", "x.bin", raw.saved(_state(draw), _use_new_zipfile_serialization=False))
    for number in range(10):
        layer = torch.nn.Linear(3, 4)
        optimizer = torch.optim.SGD(layer.parameters(), momentum=0.9)
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        tree = {
            "state_dict": layer.state_dict(),
            "optimizer_states": [optimizer.state_dict()],
            "epoch": number,
            "rng": torch.get_rng_state(),
        }
        tree |= {
            "pytorch-lightning_version": "2.4.0",
            "callbacks": {"a": {"best": torch.tensor(1.0)}},
            "numpy": np.random.get_state()[:1],
        }
        tree |= {
            "score": np.float64(0.5),
            "hyper_parameters": OrderedDict(lr=0.1, sizes=(1, 2), names={"a", "b"}),
            "device": torch.device("cpu"),
        }
        add(
            f"Lightning {number}",
            "x.ckpt",
            raw.saved(tree if number % 2 else {"model": layer.state_dict(), "optimizer": optimizer.state_dict()}),
        )
    for number in range(12):
        state = {name: tensor.detach().contiguous() for name, tensor in _state(draw).items() if name != "tied"}
        from safetensors.torch import save

        add(f"safetensors {number}", "x.safetensors", save(state, {"format": "pt"} if number % 2 else None))
    for dtype in ("F32", "F16", "BF16", *gguf.BLOCKS):
        for number in range(2):
            _, elements, size = next(value for value in gguf.TYPES.values() if value[0] == dtype)
            content = bytes(2 * elements * size * 2) if elements == 1 else raw.blocks(dtype, 4, seed=number).tobytes()
            shape = (2, 2 * elements) if elements > 1 else (4, 1)
            values = {
                "general.architecture": "llama",
                "llama.context_length": 2048,
                "scores": [0.5, 1.5],
                "tokens": ["a", "好"],
                "flag": True,
            }
            add(f"GGUF {dtype} {number}", "x.gguf", raw.gguf_file(values, {"w": (dtype, shape, content[: 4 * size])}))
    for dtype in ("Q2_K", "IQ4_NL", "MXFP4"):
        _, elements, size = next(value for value in gguf.TYPES.values() if value[0] == dtype)
        add(f"GGUF {dtype}", "x.gguf", raw.gguf_file({}, {"w": (dtype, (1, elements), bytes(size))}), "inspect")
    for family in tiny.FAMILIES:
        files = folder_of(family)
        made.append(Case(f"valid, folder {family}", files, "load", OPENED))
        made.append(Case(f"valid, tokenizer {family}", files, "tokenizer", OPENED))
        if "chat_template.jinja" in files:
            made.append(Case(f"valid, template {family}", files, "render", OPENED))
    base = folder_of()
    state = {}
    with tempfile.TemporaryDirectory() as place:
        from safetensors.torch import load_file

        (path := Path(place) / "m").write_bytes(base["model.safetensors"])  # type: ignore[arg-type]
        state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    rest = {name: content for name, content in base.items() if name != "model.safetensors"}
    names = sorted(state)
    for number in range(3):
        shards = {f"pytorch_model-{part}.bin": names[part :: number + 1] for part in range(number + 1)}
        index = {"weight_map": {name: file for file, inside in shards.items() for name in inside}}
        files = {file: raw.saved({name: state[name] for name in inside}) for file, inside in shards.items()}
        made.append(
            Case(
                f"valid, {number + 1} shards",
                rest | files | {"pytorch_model.bin.index.json": json.dumps(index).encode()},
                "load",
                OPENED,
            )
        )
    for key, value in (("auto_map", {"AutoModelForCausalLM": "modeling_x.X"}), ("_attn_implementation", "flash_attention_2"), ("attn_implementation", "sdpa"),
                       ("trust_remote_code", True), ("_name_or_path", "/home/someone/model"), ("transformers_version", "4.31.0"), ("tokenizer_file", "/root/x")):  # fmt: skip
        made.append(Case(f"valid, config with {key}", edited(base, "config.json", **{key: value}), "load", OPENED))
    return made
