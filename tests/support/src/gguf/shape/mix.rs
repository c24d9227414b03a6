//! Which type each tensor has in a quantised file, as `llama-quantize` chooses it (`llama_tensor_get_type` in
//! llama-quant.cpp).

use super::super::tensor::TensorType;

/// A mix of tensor types, named as in `llama_ftype`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(non_camel_case_types, reason = "llama.cpp's own names")]
pub(super) enum Mix {
    Q4_0,
    Q8_0,
    Q4_K_M,
}

impl Mix {
    /// The number in `llama_ftype`.
    pub(super) fn file_type(self) -> u32 {
        match self {
            Self::Q4_0 => 2,
            Self::Q8_0 => 7,
            Self::Q4_K_M => 15,
        }
    }

    /// The type of a matrix.
    pub(super) fn matrix(self) -> TensorType {
        match self {
            Self::Q4_0 => TensorType::Q4_0,
            Self::Q8_0 => TensorType::Q8_0,
            Self::Q4_K_M => TensorType::Q4_K,
        }
    }

    /// The type of the output matrix, and of an embedding that is the output matrix, too.
    pub(super) fn output(self) -> TensorType {
        match self {
            Self::Q8_0 => TensorType::Q8_0,
            Self::Q4_0 | Self::Q4_K_M => TensorType::Q6_K,
        }
    }

    /// The type of the matrices that suffer most, `attn_v` and `ffn_down`: the one numbered `i` of the `n` of its name.
    pub(super) fn sensitive(self, i: u32, n: u32) -> TensorType {
        let more_bits = i < n / 8 || i >= 7 * n / 8 || (i - n / 8) % 3 == 2;
        if self == Self::Q4_K_M && more_bits { TensorType::Q6_K } else { self.matrix() }
    }
}
