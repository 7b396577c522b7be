"""Compiles every kernel of crates/kernels/src/cuda by NVRTC, without a GPU, to the machine code of cards of several generations.

    compile.py FOLDER-OF-SOURCES

Prints registers, shared memory and what is kept in memory for want of registers, as the cubin has them; exits with 1 where the compiler refuses, where a
kernel takes more shared memory than a launch without settings may have, or where it spills.
"""

import ctypes
import pathlib
import struct
import sys

import nvidia

KERNELS = ["attend", "back_to_queries", "back_to_keys"]
WIDTHS = [(64, 64), (64, 128), (96, 96), (128, 128)]
ELEMENTS = ["bf16", "f16"]
ARCHITECTURES = ["sm_80", "sm_90a"]
SHARED_LIMIT = 48 << 10


def library():
    root = pathlib.Path(list(nvidia.__path__)[0])
    found = sorted(root.glob("**/libnvrtc.so*"))
    if not found:
        sys.exit(f"no libnvrtc in {root}")
    # It looks for this one by name, where it is loaded already.
    for builtins in found[0].parent.glob("libnvrtc-builtins.so*"):
        ctypes.CDLL(str(builtins))
    return ctypes.CDLL(str(found[0]))


def log_of(nvrtc, program):
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, text)
    return text.value.decode(errors="replace").strip()


def compile_source(nvrtc, source, name, architecture):
    """The cubin, or the compiler's words."""
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
    options = [f"--gpu-architecture={architecture}".encode(), b"-lineinfo"]
    code = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    log = log_of(nvrtc, program)
    if code != 0:
        return None, log or f"NVRTC error {code}"
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw, log


def sections(cubin):
    """Name, contents or size, and `info` of the sections of an ELF file."""
    (offset,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, offset + i * size) for i in range(count)]
    table = headers[names][4]
    for name, kind, _, _, start, length, _, info, _, _ in headers:
        end = cubin.index(b"\0", table + name)
        yield cubin[table + name : end].decode(), (b"" if kind == 8 else cubin[start : start + length]), length, info


def resources(cubin, kernel):
    """Registers, bytes of shared memory, bytes of a thread's stack."""
    registers = shared = stack = None
    for name, content, length, info in sections(cubin):
        if name == f".text.{kernel}":
            registers = registers or info >> 24 or None
        elif name == f".nv.shared.{kernel}":
            shared = length
        elif name == ".nv.info":
            # Attributes: format, kind, then for format 4 a size and that many bytes: function, number. Kind 0x11 is the size of
            # a frame, 0x2f of registers (older cards have them in the section of the code).
            at = 0
            while at + 4 <= len(content):
                form, kind, value = struct.unpack_from("<BBH", content, at)
                if form == 4 and kind == 0x11:
                    stack = max(stack or 0, struct.unpack_from("<I", content, at + 8)[0])
                if form == 4 and kind == 0x2F:
                    registers = struct.unpack_from("<I", content, at + 8)[0]
                at += 4 + (value if form == 4 else 0)
    return registers, shared, stack


def main():
    folder = pathlib.Path(sys.argv[1])
    nvrtc, failed = library(), 0
    print(f"{'kernel':16} {'widths':8} {'type':5} {'card':7} registers  shared  stack")
    for kernel in KERNELS:
        parts = [(folder / name).read_text() for name in ["device.cuh", "tiles.cuh", f"{kernel}.cu"]]
        for width, value_width in WIDTHS:
            for element in ELEMENTS:
                for architecture in ARCHITECTURES:
                    head = f'#define WIDTH {width}\n#define VALUE_WIDTH {value_width}\n#define ELEMENT "{element}"\n'
                    # As `Kernel::sixteens` of attention/gpu/tensor_cores.rs.
                    head += f"#define SIXTEENS {2 if width + value_width <= 128 else 1}\n"
                    cubin, log = compile_source(nvrtc, head + "\n".join(parts), f"{kernel}.cu", architecture)
                    row = f"{kernel:16} {f'{width}/{value_width}':8} {element:5} {architecture:7}"
                    if cubin is None:
                        sys.exit(f"{row} refused\n{log}")
                    registers, shared, stack = resources(cubin, kernel)
                    fits = None not in (registers, shared, stack) and shared <= SHARED_LIMIT and stack == 0
                    print(f"{row} {registers!s:>9} {shared!s:>7} {stack!s:>6}{'' if fits else '  DOES NOT FIT'}{' ' + log if log else ''}")
                    failed += not fits
    sys.exit(f"{failed} kernels are refused or do not fit" if failed else 0)


main()
