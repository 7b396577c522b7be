//! Sums of whole tensors that repeat bit for bit.

use burn::tensor::Tensor;

use crate::gpu;

/// `[1]`: the sum of all numbers, differentiable.
///
/// On a GPU rows are added up first, then their sums: Burn's own sum of a whole tensor adds parts atomically, in an order that differs
/// between runs. On a CPU it is Burn's.
pub fn total<const D: usize>(x: Tensor<D>) -> Tensor<1> {
    if gpu::fuses(&x) { of_rows(x) } else { x.sum() }
}

fn of_rows<const D: usize>(x: Tensor<D>) -> Tensor<1> {
    let (numbers, width) = (x.shape().num_elements(), x.dims()[D - 1]);
    if numbers == 0 {
        return x.sum();
    }
    let rows = x.reshape([numbers / width, width]).sum_dim(1);
    rows.reshape([numbers / width]).sum_dim(0)
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Distribution};

    use super::*;
    use crate::random;

    #[test]
    fn rows_add_up_to_all() {
        let device = Device::flex().autodiff();
        for shape in [[3, 1, 7], [1, 1, 1], [2, 5, 4], [2, 0, 4]] {
            let x = random::<3>(shape, Distribution::Uniform(-1.0, 1.0), &device).require_grad();
            let [rows, plain] = [of_rows(x.clone()), x.clone().sum()];
            let apart = (rows.clone() - plain).abs().into_scalar::<f32>();
            assert!(apart < 1e-5, "{shape:?}: {apart}");
            let grad = x.grad(&rows.backward()).expect("gradient");
            assert!(grad.into_data().iter::<f32>().all(|value| value == 1.0));
        }
        assert_eq!(of_rows(Tensor::<1>::from_floats([1.0, 2.5], &device)).into_scalar::<f32>(), 3.5);
    }
}
