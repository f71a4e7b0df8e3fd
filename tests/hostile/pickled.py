"""Hostile pickles and archives; what would run only leaves a mark, the file CANARY where the process stands."""

from __future__ import annotations

import pickle
import random
import struct
import tarfile
import zlib
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import torch

from tests.hostile import raw
from tests.hostile.case import Case

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
copyreg._reconstructor copyreg.add_extension _codecs.decode collections.namedtuple
idlelib.pyshell.ModifiedInterpreter.runcode
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
        "a reference of no storage": table + weight + b"X\x01\x00\x00\x00aQs.",
        "INST": b"(S'touch'\niposix\nsystem\n.",
        "OBJ": b"(" + system + mark + b"o.",
        "NEWOBJ_EX": table + weight + system + mark + b"\x85}\x92s.",
        "PERSID": b"P0\n.",
        "EXT1": b"\x80\x02\x82\x01.",
        "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
        "BYTEARRAY8": b"\x80\x05\x96\x08" + bytes(15) + b".",
        "NEXT_BUFFER": b"\x80\x05\x97.",
        "DUP": b"\x80\x02}20.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + mark + b"\x85R.",
        "STACK_GLOBAL of numbers": b"\x80\x04K\x01K\x02\x93.",
        "a name in parts": b"\x80\x04\x8c\x02os\x8c\x0bpath.system\x93.",
        "a module with a dot name": b"\x80\x04\x8c\x08builtins\x8c\x0c__dict__.get\x93.",
        "BUILD on a class": b"\x80\x02ccollections\nOrderedDict\n}b.",
        "BUILD on a number": b"\x80\x02K\x01}b.",
        "a call of a table": b"\x80\x02})R.",
        "a call of a storage class": b"\x80\x02ctorch\nFloatStorage\n)R.",
        "a parameter of a number": call("torch._utils._rebuild_parameter", 1, True, {}),
        "rebuild by a gadget": call("torch._tensor._rebuild_from_type_v2", "os.system", "x", ("x",), {}),
        "a quantised tensor": call("torch._utils._rebuild_qtensor", 1, 2, 3),
        "a sparse tensor": call("torch._utils._rebuild_sparse_tensor", 1, 2),
        "bytes in UTF-7": call("_codecs.encode", "a", "utf-7"),
        "nothing": b"",
        "no end": b"\x80\x02}",
        "an empty stack": b"\x80\x02.",
        "a memo of nothing": b"\x80\x02h\x07.",
        "a mark of nothing": b"\x80\x02t.",
        "an unknown opcode": b"\x80\x02\xff.",
        "a number": b"\x80\x02K\x01.",
        "a pickle in a pickle": b"\x80\x02C\x04\x80\x02}.",
        "no tensors": b"\x80\x02}X\x01\x00\x00\x00aK\x01s.",
        "a table as a key": b"\x80\x02}}K\x01s.",
        "a text without end": b"\x80\x02X\xff\xff\xff\x7fa.",
        "bytes without end": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fa.",
        "a long without end": b"\x80\x02\x8b\xff\xff\xff\x7fa.",
        "a frame without end": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.",
        "digits without end": b"I" + b"9" * 100_000 + b"\n.",
        "a long of a megabyte": b"\x80\x02\x8b\x00\x00\x10\x00" + b"\x7f" * (1 << 20) + b".",
        "a million lists": b"\x80\x02(" + b"]" * 1_500_000 + b"l.",
        "keys that take for ever": b"\x80\x02})"
        + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(50))
        + b"K\x01s.",
        "tables in tables": b"\x80\x02" + b"}X\x01\x00\x00\x00a" * 200_000 + b"K\x01" + b"s" * 200_000 + b".",
        "a text of two megabytes": b"\x80\x02}X\x00\x00\x20\x00" + b"a" * (2 << 20) + b"K\x01s.",
    }
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
        "compressed": {"method": 8},
        "another method": {"method": 93},
        "encrypted": {"flags": 1},
        "sizes too large": {"size": 1},
        "sizes of gigabytes": {"size": 1 << 31},
        "more entries than there are": {"count": 60_000},
        "no entries": {"count": 0},
        "a directory elsewhere": {"offset": 7},
        "a directory beyond": {"offset": 1 << 31},
        "a long directory": {"length": 1 << 31},
        "a short directory": {"length": 10},
        "something before": {"before": b"#!/bin/sh\ntouch CANARY\n"},
        "something behind": {"after": b"PK\3\4 and so on"},
        "another name in the header": {"local": {"archive/data.pkl": "archive/data.pkx"}},
        "an entry on another": {"places": {"archive/byteorder": 0}},
        "an entry beyond": {"places": {"archive/byteorder": 1 << 30}},
    }
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
    for name, start in (
        ("7z", b"7z\xbc\xaf\x27\x1c"),
        ("gzip", b"\x1f\x8b"),
        ("HDF5", b"\x89HDF\r\n"),
        ("a program", b"\x7fELF"),
        ("a script", b"#!/bin/sh\ntouch CANARY\n"),
        ("a page", b"<html>"),
        ("nothing", b""),
        ("GGML of old", b"ggjt"),
        ("npy", b"\x93NUMPY"),
        ("zeros", bytes(64)),
    ):
        made[f"another file, {name}"] = start + bytes(draw.randrange(256) for _ in range(100 if start else 0))
    made |= {f"archive, cut at {place}": state[:place] for place in draw.sample(range(1, len(state)), 12)}
    made |= {f"stream, cut at {place}": stream[:place] for place in draw.sample(range(1, len(stream)), 8)}
    for name, content in made.items():
        yield Case(name, {"x.bin": content}, "inspect", opened="x.bin")
