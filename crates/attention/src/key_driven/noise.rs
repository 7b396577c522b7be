//! PGQA: noise that takes away what the outputs of a group's heads have in common.
//!
//! The paper speaks of Gaussian noise on the attention maps; the authors' code, which is followed, subtracts standardised
//! uniform noise from the outputs. A row is a head's output at all positions, `[seq * head_dim]`:
//!
//! ```text
//! o := o - (u σ(o) + μ(o))     u: mean 0, standard deviation 1, nothing at column i of the i-th head of a group
//! ```

use burn::tensor::{DType, Tensor, TensorData};
use polyhead_kernels::in_type;

/// Outputs of heads with noise taken off them; every row then has mean 0.
///
/// # Shapes
/// - heads: `[batch, n_heads, seq, head_dim]`; the output too
/// - uniform: `[n_heads, seq * head_dim]`, drawn from 0 to 1, the same for the whole batch
pub fn perturbed(heads: Tensor<4>, query_heads: &[usize], uniform: Tensor<2>) -> Tensor<4> {
    let [batch, n_heads, seq, width] = heads.dims();
    let columns = seq * width;
    let given = heads.dtype();
    let rows = in_type(heads.reshape([batch, n_heads, columns]), DType::F32);
    let mean = rows.clone().mean_dim(2);
    let deviation = deviation(rows.clone() - mean.clone());

    let within = query_heads.iter().flat_map(|&count| 0..count);
    let off_diagonal: Vec<f32> = within.flat_map(|own| (0..columns).map(move |at| f32::from(at != own))).collect();
    let off_diagonal = Tensor::from_data(TensorData::new(off_diagonal, [n_heads, columns]), &uniform.device());
    let noise: Tensor<3> = (uniform * off_diagonal).unsqueeze::<3>();
    let noise = noise.clone() - noise.mean_dim(2);
    let noise = noise.clone() / self::deviation(noise);

    in_type((rows - (noise * deviation + mean)).reshape([batch, n_heads, seq, width]), given)
}

/// `[rows, heads, 1]`: the standard deviation of rows whose mean is 0, with n - 1 in the denominator.
fn deviation(centred: Tensor<3>) -> Tensor<3> {
    let n = centred.dims()[2];
    // A row without spread has next to no deviation and passes no gradient on.
    (centred.square().sum_dim(2) / n.saturating_sub(1).max(1) as f64).clamp_min(f32::MIN_POSITIVE).sqrt()
}
