//! Images of another size: separable filters as Pillow and PyTorch (`antialias=True`, `align_corners=False`) apply them. Where an
//! image gets smaller, the filter gets wider, so that nothing aliases; at the edge only the pixels count that are there.

use burn::tensor::{Device, Tensor, TensorData};

/// How pixels are interpolated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// Linear, over 2 pixels.
    Bilinear,
    /// Cubic, over 4 pixels, with a = -0.5 (Keys 1981).
    Bicubic,
}

impl Filter {
    /// Pixels on either side.
    fn reach(self) -> f64 {
        match self {
            Self::Bilinear => 1.0,
            Self::Bicubic => 2.0,
        }
    }

    fn weight(self, distance: f64) -> f64 {
        const A: f64 = -0.5;
        match (self, distance.abs()) {
            (Self::Bilinear, x) => (1.0 - x).max(0.0),
            (Self::Bicubic, x) if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
            (Self::Bicubic, x) if x < 2.0 => ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A,
            (Self::Bicubic, _) => 0.0,
        }
    }
}

/// An image of another height and width, differentiable.
///
/// # Shapes
/// - image: `[batch, channels, height, width]`; size: the new height and width
pub fn resampled(image: Tensor<4>, [height, width]: [usize; 2], filter: Filter) -> Tensor<4> {
    let turned = along_rows(image, width, filter).swap_dims(2, 3);
    along_rows(turned, height, filter).swap_dims(2, 3)
}

fn along_rows(image: Tensor<4>, length: usize, filter: Filter) -> Tensor<4> {
    let [batch, channels, rows, from] = image.dims();
    if from == length {
        return image;
    }
    let weights = weights(from, length, filter, &image.device());
    let lines = image.reshape([batch * channels * rows, from]).matmul(weights);
    lines.reshape([batch, channels, rows, length])
}

/// `[from, to]`: what each pixel adds to each new one.
fn weights(from: usize, to: usize, filter: Filter, device: &Device) -> Tensor<2> {
    let scale = from as f64 / to as f64;
    let wider = scale.max(1.0);
    let mut all = vec![0.0; from * to];
    for new in 0..to {
        let centre = (new as f64 + 0.5) * scale;
        let weight = |old: usize| filter.weight((old as f64 + 0.5 - centre) / wider);
        let [first, end] = [-1.0, 1.0].map(|side| (centre + side * filter.reach() * wider).clamp(0.0, from as f64));
        let near = first.floor() as usize..end.ceil() as usize;
        let sum: f64 = near.clone().map(weight).sum();
        near.for_each(|old| all[old * to + new] = (weight(old) / sum) as f32);
    }
    Tensor::from_data(TensorData::new(all, [from, to]), device)
}
