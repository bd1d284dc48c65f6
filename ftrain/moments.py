"""How AdamW's moments are kept between steps: in fp32, in bf16, or in 8 bits with a scale for each block.

Whatever is chosen, a step computes in fp32: moments are read, updated, and rounded again. A step changes them by a
few percent or, where beta2 is 0.999, by a thousandth: less than lies between two numbers of bf16 (0.4 to 0.8%), let
alone of 8 bits. Rounded to the nearest, a moment would stay where it is: nu, once large, would never be small again.
So they are rounded up or down as often as keeps their mean: by a number that the remainder is compared with, of the
element's place and the step alone, the same in every copy and again after a resume.

8bit is that of "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861): a code for each element and the
largest magnitude of each block of 256, in fp32; blocks are cut of a rank's own piece as it lies in memory. The codes
are floating-point numbers with three bits of mantissa, 6 to 12% apart, up to 1; their bits are cut out of fp32's:

    mu  int8    sign and magnitude: 0, and 127 numbers from 2e-5.
    nu  uint8   256 numbers from 3e-10, which is 2e-5 of a gradient, and no 0: where nu were 0 before mu is, an
                update would be mu / eps. (The paper's code of nu begins with a 0 and 3e-7.)

What was rounded so and is read comes back the same when it is rounded to the nearest, so that a checkpoint in fp32
loses nothing. Parameters of fewer than 4096 elements (norms, biases) keep fp32, as in the paper.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # elements that share a scale
SMALLEST = 4096  # elements of a parameter whose moments are kept in less than fp32
KEPT = ("fp32", "bf16", "8bit")
_CUT = 20  # lowest bits of fp32 that a code has not
_ONE = 127 << 3  # 1.0 without them


class Coded(NamedTuple):
    """A moment in 8 bits: codes as the parameter lies, int8 of mu and uint8 of nu, and scales [blocks], fp32, at least
    one for each block of the piece. Both are DTensors, or both this rank's pieces of them."""

    codes: Tensor
    scales: Tensor

    # What else is asked of a DTensor that holds a moment.
    shape = property(lambda self: self.codes.shape)
    dtype = property(lambda self: self.codes.dtype)
    placements = property(lambda self: self.codes.placements)
    device_mesh = property(lambda self: self.codes.device_mesh)

    def to_local(self) -> "Coded":
        return Coded(self.codes.to_local(), self.scales.to_local())

    def detach(self) -> "Coded":
        return Coded(self.codes.detach(), self.scales.detach())


Moment = Tensor | Coded  # of a rank's piece, or part of it


def dtypes(kept: str, numel: int) -> tuple[torch.dtype, torch.dtype]:
    """The dtypes of mu and nu of a parameter of so many elements. Raises ValueError for an unknown `kept`."""
    if kept not in KEPT:
        raise ValueError(f"--optimizer-state {kept}: must be one of {', '.join(KEPT)}")
    if kept == "fp32" or numel < SMALLEST:
        return torch.float32, torch.float32
    return (torch.bfloat16, torch.bfloat16) if kept == "bf16" else (torch.int8, torch.uint8)


def blocks(numel: int) -> int:
    return -(-numel // BLOCK)


def size(moment: Moment) -> int:
    """The bytes of a piece."""
    return sum(t.numel() * t.element_size() for t in (moment if isinstance(moment, Coded) else (moment,)))


def read(moment: Moment) -> Tensor:
    """A piece in fp32, itself where it is kept so."""
    if not isinstance(moment, Coded):
        return moment.float()
    codes, scales = moment
    code = codes.reshape(-1).int()
    if codes.dtype is torch.uint8:
        values = code.add_(_ONE - 255).bitwise_left_shift_(_CUT).view(torch.float32)
    else:
        sign = code.sign()
        values = code.abs_().add_(_ONE - 127).bitwise_left_shift_(_CUT).view(torch.float32).mul_(sign)
    rows = _in_blocks(values).mul_(scales[: blocks(len(values)), None])
    return rows.view(-1)[: len(values)].view(codes.shape)


def write_(moment: Moment, values: Tensor) -> None:
    """Keep the `values` of a piece, each rounded to the nearest that can be kept."""
    if isinstance(moment, Coded):
        codes, scales = encode(values.reshape(-1).float(), moment.dtype, 1 << _CUT - 1)
        moment.codes.copy_(codes.view(moment.shape))
        moment.scales[: len(scales)] = scales
    else:
        moment.copy_(values)


def rounded(values: Tensor, dtype: torch.dtype, noise: Tensor) -> tuple[Tensor, ...]:
    """values [n] fp32, `noise` [n] -> what is kept of them: in bf16, or codes and scales.

    A value is rounded up where noise and its remainder, of the way from the number below to the one above, exceed 1.
    """
    if dtype is torch.bfloat16:
        # What is carried out of the lower half of fp32 rounds bf16, the upper half, away from 0.
        bits = (noise >> _CUT - 16).add_(values.view(torch.int32)).bitwise_and_(-65536)
        return (bits.view(torch.float32).bfloat16(),)
    return encode(values, dtype, noise)


def encode(values: Tensor, dtype: torch.dtype, noise: Tensor | int) -> Coded:
    """values [n] fp32 -> codes [n], scales [blocks(n)]. noise: as of `rounded`; half of 2^20 rounds to the nearest."""
    rows = _in_blocks(values.abs())
    scales = rows.amax(1)
    size = rows.div_(scales.where(scales > 0, 1.0)[:, None]).view(-1)[: len(values)]
    code = (size.view(torch.int32) + noise).bitwise_right_shift_(_CUT)
    if dtype is torch.uint8:
        return Coded(code.sub_(_ONE - 255).clamp_(min=0).to(torch.uint8), scales)
    least = 1.25 * 2**-16  # of code 1; what is less goes there or to 0
    up = (size * (2**_CUT / least)).add_(noise) > 2**_CUT
    code = torch.where(size < least, up, code.sub_(_ONE - 127)).to(torch.int8)
    return Coded(torch.where(values < 0, -code, code), scales)


def _in_blocks(values: Tensor) -> Tensor:
    """[n] -> [blocks(n), BLOCK], with zeros after the last."""
    short = -len(values) % BLOCK
    return (F.pad(values, (0, short)) if short else values).view(-1, BLOCK)


def noise(start: int, end: int, step: Tensor, seed: int = 0) -> Tensor:
    """[end - start] int32 in [0, 2^20): of the elements start, ... of a piece at a step (0-dim, any dtype).

    Evenly spread over steps and over places, by the two irrational bases of the R2 sequence (Roberts, "The
    unreasonable effectiveness of quasirandom sequences", 2018): over a few steps the errors of rounding cancel, where
    those of independent draws would add up to a random walk. Arithmetic is that of 32 bits, which wrap.
    """
    first = (step.long() * 0x91E10DA5 + (start * 0xC13FA9A9 + seed) % 2**32).int()
    bits = torch.arange(end - start, dtype=torch.int32, device=step.device).mul_(0xC13FA9A9 - 2**32).add_(first)
    return bits.bitwise_right_shift_(32 - _CUT).bitwise_and_(2**_CUT - 1)
