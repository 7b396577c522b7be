//! Attention inside patches of an image that overlap by two pixels (CATANet's local attention, see `token_centres.rs`).

use burn::module::Module;
use burn::tensor::{Device, IndexingUpdateOp, Int, Tensor, TensorData};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::parts::{Projections, Widths};
use crate::{Norm, NormKind};

/// Pixels that a patch shares with the next.
const SHARED: usize = 2;

/// What becomes of pixels that several patches hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Overlap {
    /// The sum, halved for each patch behind the first along rows and along columns: the authors' code. Three patches meet where the
    /// last is moved to end with the image, and divide by 4 there.
    #[default]
    Halved,
    /// The mean.
    Mean,
}

/// Attention inside patches, added to what it reads.
#[derive(Module, Debug)]
pub struct LocalAttention {
    /// Before the projections
    pub norm: Norm,
    /// Of pixels
    pub pixels: Projections,
    patch: usize,
    #[module(skip)]
    overlap: Overlap,
}

impl LocalAttention {
    pub(super) fn init(patch: usize, overlap: Overlap, widths: Widths, device: &Device) -> Self {
        let norm = Norm::init(NormKind::Layer, widths.d_model, device);
        Self { norm, pixels: Projections::init(widths, device), patch, overlap }
    }

    /// `[batch, rows * columns, d_model]`, row by row.
    ///
    /// # Panics
    /// If the image is smaller than a patch.
    pub(super) fn forward(&self, x: Tensor<3>, grid: [usize; 2], eps: f64) -> Tensor<3> {
        let ([batch, n, d_model], device, area) = (x.dims(), x.device(), self.patch * self.patch);
        let [rows, columns] = grid.map(|length| Axis::of(length, self.patch));
        let places: Vec<i32> = places(&rows, &columns, self.patch).into_iter().map(|place| place as i32).collect();
        let count = places.len();
        let places = Tensor::<1, Int>::from_data(TensorData::new(places, [count]), &device);
        let cut = |x: Tensor<3>| x.select(1, places.clone()).reshape([batch * count / area, area, d_model]);
        let attended = cut(x.clone()) + self.pixels.forward(cut(self.norm.forward(x, eps)));
        let attended = attended.reshape([batch, count, d_model]);
        let sums = Tensor::zeros([batch, n, d_model], &device);
        let sums = sums.select_assign(1, places, attended, IndexingUpdateOp::Add);
        let [down, across] = [&rows, &columns].map(|axis| axis.divisors(self.patch, self.overlap));
        let shares: Vec<f32> =
            down.iter().flat_map(|down| across.iter().map(move |across| 1.0 / (down * across))).collect();
        sums * Tensor::from_data(TensorData::new(shares, [1, n, 1]), &device)
    }
}

/// Where patches begin along an axis.
pub struct Axis {
    length: usize,
    /// As they would begin, one step after the other.
    raw: Vec<usize>,
}

impl Axis {
    /// Of an axis that is at least as long as a patch.
    pub fn of(length: usize, patch: usize) -> Self {
        assert!(length >= patch, "validate: images are as large as patches");
        let step = patch - SHARED;
        Self { length, raw: (0..length + step - patch).step_by(step).collect() }
    }

    /// As they do begin: the last one ends with the axis.
    pub fn starts(&self, patch: usize) -> Vec<usize> {
        self.raw.iter().map(|&start| start.min(self.length - patch)).collect()
    }

    /// What the sum at each pixel is divided by.
    pub fn divisors(&self, patch: usize, overlap: Overlap) -> Vec<f32> {
        let starts = self.starts(patch);
        let of = |at: usize| match overlap {
            Overlap::Mean => starts.iter().filter(|&&start| (start..start + patch).contains(&at)).count() as f32,
            Overlap::Halved => {
                let later = starts.iter().zip(&self.raw).skip(1);
                later
                    .filter(|(start, raw)| (**start..**raw + SHARED).contains(&at))
                    .fold(1.0, |divisor, _| 2.0 * divisor)
            }
        };
        (0..self.length).map(of).collect()
    }
}

/// The pixels of all patches, patch by patch, row by row.
fn places(rows: &Axis, columns: &Axis, patch: usize) -> Vec<usize> {
    let [down, across] = [rows, columns].map(|axis| axis.starts(patch));
    let mut places = Vec::new();
    for top in &down {
        for left in &across {
            for row in *top..top + patch {
                places.extend((*left..left + patch).map(|column| row * columns.length + column));
            }
        }
    }
    places
}
