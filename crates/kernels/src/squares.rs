//! The squares of many tensors, each added up for itself, in one read from the device: the norm of a whole gradient.

use burn::tensor::Tensor;

#[cfg(feature = "gpu")]
use crate::gpu;

/// Sums of squares, still on the device.
///
/// On a GPU a tensor takes one kernel, which reads it once and leaves parts of its sum, always the same ones; Burn's operations take four,
/// write its squares, and add in an order that differs between runs.
#[derive(Debug, Default)]
pub struct SumsOfSquares {
    added: usize,
    /// Sums, with the places of their tensors.
    sums: Vec<(usize, Tensor<1>)>,
    /// Tensors whose sums are made when they are read, with their places.
    #[cfg(feature = "gpu")]
    whole: Vec<(usize, Tensor<1>)>,
}

impl SumsOfSquares {
    /// Adds a tensor, on the device of the others, without autodiff; gives its place among the sums.
    pub fn add<const D: usize>(&mut self, x: Tensor<D>) -> usize {
        let at = self.added;
        self.added += 1;
        #[cfg(feature = "gpu")]
        if gpu::fuses(&x) {
            let numbers = x.shape().num_elements();
            self.whole.push((at, x.reshape([numbers])));
            return at;
        }
        self.sums.push((at, x.square().sum()));
        at
    }

    /// The sums, in the order in which the tensors were added.
    pub fn read(self) -> Vec<f64> {
        let mut read = vec![0.0; self.added];
        let (places, sums): (Vec<usize>, Vec<Tensor<1>>) = self.sums.into_iter().unzip();
        if !sums.is_empty() {
            let values = Tensor::cat(sums, 0).into_data();
            places.into_iter().zip(values.iter::<f64>()).for_each(|(at, sum)| read[at] = sum);
        }
        #[cfg(feature = "gpu")]
        fused::read(self.whole, &mut read);
        read
    }
}

#[cfg(feature = "gpu")]
mod fused {
    use burn::backend::tensor::FloatTensor;
    use burn::backend::{Backend, Cube, Dispatch, backend_extension};
    use burn::tensor::{DType, Tensor};
    use burn_cubecl::tensor::CubeTensor;

    use crate::gpu::squares::{add_squares, parts_of};

    /// Reads the parts of all sums at once and adds them up, in order.
    pub(super) fn read(tensors: Vec<(usize, Tensor<1>)>, sums: &mut [f64]) {
        let counts: Vec<(usize, usize)> = tensors.iter().map(|(at, x)| (*at, parts_of(x.dims()[0]))).collect();
        let total = counts.iter().map(|(_, count)| count).sum::<usize>();
        let Some((_, first)) = tensors.first().filter(|_| total > 0) else { return };
        let mut parts = Tensor::<1>::empty([total], (&first.device(), DType::F32)).into_dispatch();
        let mut start = 0;
        for ((_, x), (_, count)) in tensors.into_iter().zip(&counts) {
            parts = Dispatch::squares(x.into_dispatch(), parts, start);
            start += count;
        }
        let parts = Tensor::<1>::from_dispatch(parts).into_data();
        let mut parts = parts.iter::<f64>();
        for (at, count) in counts {
            sums[at] = parts.by_ref().take(count).sum();
        }
    }

    #[backend_extension(Cube)]
    trait Squares: Backend {
        /// Writes the parts of the sum of x behind `start`, in place.
        fn squares(x: FloatTensor<Self>, parts: FloatTensor<Self>, start: usize) -> FloatTensor<Self>;
    }

    impl Squares for Cube {
        fn squares(x: CubeTensor, parts: CubeTensor, start: usize) -> CubeTensor {
            add_squares(x, parts, start)
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::testing::{agree, normal, numbers};

    #[test]
    fn sums_are_in_the_order_of_the_tensors() {
        let device = Device::flex();
        let (a, b): (Tensor<2>, Tensor<1>) = (normal([3, 50], &device), normal([7], &device));
        let mut sums = SumsOfSquares::default();
        assert_eq!([sums.add(a.clone()), sums.add(b.clone()), sums.add(Tensor::<1>::empty([0], &device))], [0, 1, 2]);
        let want = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>();
        let got: Vec<f32> = sums.read().into_iter().map(|sum| sum as f32).collect();
        agree("sums", &got, &[want(&numbers(a)), want(&numbers(b)), 0.0]);
        assert!(SumsOfSquares::default().read().is_empty());
    }
}
