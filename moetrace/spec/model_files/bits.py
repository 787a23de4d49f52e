"""How many bits a weight takes in each format, with the scales that are stored beside it.

The types of GGUF files are those of `ggml.h` of llama.cpp: a block of weights, and the bytes that it takes. The others
follow from what a group of weights is made of, as each line says.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class BlockType(NamedTuple):
    """A type of a GGUF tensor: `block_bytes` for each `block` weights of a row."""

    name: str
    block: int
    block_bytes: int

    @property
    def bits(self) -> float:
        """Bits of a weight, scales included."""
        return 8 * self.block_bytes / self.block


# Number of a type in a GGUF file -> the type.
GGML_TYPES: Mapping[int, BlockType] = MappingProxyType(
    {
        0: BlockType("F32", 1, 4),
        1: BlockType("F16", 1, 2),
        2: BlockType("Q4_0", 32, 18),
        3: BlockType("Q4_1", 32, 20),
        6: BlockType("Q5_0", 32, 22),
        7: BlockType("Q5_1", 32, 24),
        8: BlockType("Q8_0", 32, 34),
        9: BlockType("Q8_1", 32, 40),
        10: BlockType("Q2_K", 256, 84),
        11: BlockType("Q3_K", 256, 110),
        12: BlockType("Q4_K", 256, 144),
        13: BlockType("Q5_K", 256, 176),
        14: BlockType("Q6_K", 256, 210),
        15: BlockType("Q8_K", 256, 292),
        16: BlockType("IQ2_XXS", 256, 66),
        17: BlockType("IQ2_XS", 256, 74),
        18: BlockType("IQ3_XXS", 256, 98),
        19: BlockType("IQ1_S", 256, 50),
        20: BlockType("IQ4_NL", 32, 18),
        21: BlockType("IQ3_S", 256, 110),
        22: BlockType("IQ2_S", 256, 82),
        23: BlockType("IQ4_XS", 256, 136),
        24: BlockType("I8", 1, 1),
        25: BlockType("I16", 1, 2),
        26: BlockType("I32", 1, 4),
        27: BlockType("I64", 1, 8),
        28: BlockType("F64", 1, 8),
        29: BlockType("IQ1_M", 256, 56),
        30: BlockType("BF16", 1, 2),
        34: BlockType("TQ1_0", 256, 54),
        35: BlockType("TQ2_0", 256, 66),
        39: BlockType("MXFP4", 32, 17),
        40: BlockType("NVFP4", 64, 36),
        41: BlockType("Q1_0", 128, 18),
    }
)


class Format(NamedTuple):
    """A format of weights outside GGUF files."""

    name: str
    bits: float
    stored: str  # what a group of weights is made of


# Bits of the formats of a config.json; a scale for 128 x 128 weights or for a row is too small to count.
FORMATS = (
    Format("BF16, FP16", 16.0, "16 bit"),
    Format("FP8, blocks of 128 x 128", 8.0, "8 bit; the scales are not counted"),
    Format("MXFP8", 8.25, "32 weights of 8 bit, a scale of 8"),
    Format("INT8, a scale a row", 8.0, "8 bit; the scales are not counted"),
    Format("NVFP4", 4.5, "16 weights of 4 bit, a scale of 8"),
    Format("MXFP4", 4.25, "32 weights of 4 bit, a scale of 8"),
    Format("AWQ, GPTQ, 4 bit, groups of 128", 4.15625, "128 weights of 4 bit, a scale of 16, a zero point of 4"),
    Format("compressed-tensors, 4 bit, groups of 32", 4.5, "32 weights of 4 bit, a scale of 16"),
    Format("bitsandbytes, 4 bit", 4.5, "64 weights of 4 bit, a scale of 32"),
    Format("bitsandbytes, 4 bit, double quantization", 4.125, "64 weights of 4 bit, a scale of 8"),
    Format("MLX, 4 bit, groups of 64", 4.5, "64 weights of 4 bit, a scale and a bias of 16"),
)
FORMAT_BITS: Mapping[str, float] = MappingProxyType({form.name: form.bits for form in FORMATS})
