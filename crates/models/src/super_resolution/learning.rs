//! How a super-resolution network learns, and what it is judged by: large images that are reduced, enlarged again and compared with
//! themselves, beside what a bicubic filter makes of them.

use burn::tensor::{Device, Tensor};
use polyhead_attention::{Mask, Observation, Observe};
use serde::{Deserialize, Serialize};

use super::network::{Enlarged, Mixer, SuperResolution};
use super::parts;
use super::quality::{Quality, quality};
use super::token_centres::Phase;
use super::{COLOURS, Images, MixerConfig, NORM_EPS};
use crate::loss::mean;
use crate::resample::{Filter, resampled};
use crate::{ContextMask, EvalTotals, Evaluated, ImageRows, Loss, Trainable};

impl SuperResolution {
    /// What images are reduced to, in steps of 1/255: `[batch, 3, height / scale, width / scale]`.
    pub fn reduced(&self, high: Tensor<4>) -> Tensor<4> {
        let [_, _, height, width] = high.dims();
        let small = [height, width].map(|length| length / self.config().scale);
        in_steps(resampled(high, small, Filter::Bicubic))
    }

    /// Images reduced, and enlarged again.
    fn compare(&self, high: Tensor<4>) -> Compared {
        let [n, _, height, width] = high.dims();
        let low = self.reduced(high.clone());
        let bicubic = in_steps(resampled(low.clone(), [height, width], Filter::Bicubic));
        let ours = self.forward(low, Phase::Evaluation, &Observe::Nothing).image;
        let loss = f64::from((ours.clone() - high.clone()).abs().mean().into_scalar::<f32>()) * n as f64;
        let all = [bicubic, in_steps(ours), high].map(|image| image.into_data().iter::<f32>().collect::<Vec<f32>>());
        let size = COLOURS * height * width;
        let image = |at: usize| all.each_ref().map(|all| all[at * size..(at + 1) * size].to_vec());
        Compared { loss, images: (0..n).map(image).collect() }
    }
}

/// What becomes of images that are reduced and enlarged again.
struct Compared {
    /// Summed over the images.
    loss: f64,
    /// Each enlarged by a bicubic filter, by the network, and as it was: `[3, height, width]`, from 0 to 1.
    images: Vec<[Vec<f32>; 3]>,
}

/// Values in steps of 1/255, as files hold them.
fn in_steps(image: Tensor<4>) -> Tensor<4> {
    (image.clamp(0.0, 1.0) * 255.0).round() / 255.0
}

/// What an evaluation adds up, over images.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct ImageTotals {
    loss: f64,
    images: u64,
    /// Images that are nearer to the truth by the network than by a bicubic filter.
    better: u64,
    ours: Quality,
    bicubic: Quality,
}

impl ImageTotals {
    /// Means over the images: by the network, and by a bicubic filter.
    pub fn qualities(&self) -> [Quality; 2] {
        let n = self.images.max(1) as f64;
        [self.ours, self.bicubic].map(|sum| Quality { psnr: sum.psnr / n, ssim: sum.ssim / n })
    }

    /// The means by name.
    pub fn named(&self) -> [(&'static str, f64); 4] {
        let [ours, bicubic] = self.qualities();
        [("psnr", ours.psnr), ("ssim", ours.ssim), ("bicubic_psnr", bicubic.psnr), ("bicubic_ssim", bicubic.ssim)]
    }
}

impl EvalTotals for ImageTotals {
    fn add(&mut self, other: Self) {
        self.loss += other.loss;
        self.images += other.images;
        self.better += other.better;
        for (sum, more) in [(&mut self.ours, other.ours), (&mut self.bicubic, other.bicubic)] {
            sum.psnr += more.psnr;
            sum.ssim += more.ssim;
        }
    }

    /// Right are the images that are nearer to the truth than by a bicubic filter.
    fn evaluated(&self) -> Evaluated {
        Evaluated { loss: self.loss, correct: self.better, targets: self.images, bytes: 0 }
    }

    fn numbers(&self) -> Vec<(&'static str, f64)> {
        let [psnr, ssim, bicubic_psnr, bicubic_ssim] = self.named().map(|(_, value)| value);
        vec![
            ("psnr/validation", psnr),
            ("ssim/validation", ssim),
            ("bicubic_psnr/validation", bicubic_psnr),
            ("bicubic_ssim/validation", bicubic_ssim),
        ]
    }
}

impl Trainable for SuperResolution {
    type Batch = Images;
    type Totals = ImageTotals;

    fn device(&self) -> Device {
        self.input.weight.val().device()
    }

    fn n_layers(&self) -> usize {
        self.layers.len()
    }

    fn loss_under(&self, batch: &Images, _context: ContextMask) -> Loss {
        let high = batch.tensor(&self.device());
        let low = self.reduced(high.clone());
        let Enlarged { image, centres, penalties, .. } = self.forward(low, Phase::Training, &Observe::Nothing);
        let difference = (image - high).abs().mean() * batch.len() as f64;
        Loss { found: centres, penalty: mean(penalties), ..Loss::of(difference) }
    }

    fn is_due(&self, step: u64) -> bool {
        self.layers.iter().any(|layer| matches!(&layer.mixer, Mixer::Attention(mixer) if mixer.is_due(step)))
    }

    fn before_step(&mut self, batch: &Images, step: u64) {
        if !self.is_due(step) {
            return;
        }
        let mut x = self.input.forward(self.reduced(batch.tensor(&self.device())));
        let [_, _, rows, columns] = x.dims();
        for layer in &mut self.layers {
            let tokens = parts::tokens(x.clone());
            if let Mixer::Attention(mixer) = &mut layer.mixer {
                mixer.before_step(layer.norm.forward(tokens.clone(), NORM_EPS), &Mask::none(), step);
            }
            let mixed = layer.mix(tokens, [rows, columns], Phase::Training, &Observe::Nothing);
            x = layer.finish(x, mixed.hidden);
        }
    }

    fn follow(&mut self, found: Vec<Tensor<2>>) {
        let mixers = self.layers.iter_mut().filter_map(|layer| match &mut layer.mixer {
            Mixer::TokenCentres(mixer) => Some(mixer),
            Mixer::Attention(_) => None,
        });
        mixers.zip(found).for_each(|(mixer, centres)| mixer.follow(centres));
    }

    fn totals(&self, batch: &Images) -> ImageTotals {
        let (size, border) = ([batch.height, batch.width], self.config().scale);
        let mut sums = ImageTotals { images: batch.len() as u64, ..ImageTotals::default() };
        let Compared { loss, images } = self.compare(batch.tensor(&self.device()));
        sums.loss = loss;
        for [bicubic, ours, truth] in images {
            let [bicubic, ours] = [bicubic, ours].map(|image| quality(&image, &truth, size, border));
            sums.better += u64::from(ours.psnr > bicubic.psnr);
            for (sum, one) in [(&mut sums.ours, ours), (&mut sums.bicubic, bicubic)] {
                sum.psnr += one.psnr;
                sum.ssim += one.ssim;
            }
        }
        sums
    }

    /// Of token centres, the map shows which of them each pixel of the first image is nearest to; of other mechanisms there are maps
    /// where the image is small enough.
    fn observe_layers(&self, batch: &Images, observe: Observe) -> Vec<Observation> {
        /// Pixels between which attention maps are made, 64 MiB a head; chosen by us.
        const MOST: usize = 4096;
        let low = self.reduced(batch.tensor(&self.device()).narrow(0, 0, 1));
        let [_, _, rows, columns] = low.dims();
        let observe = match (&self.config().mixer, observe) {
            (MixerConfig::Attention(_), Observe::Maps) if rows * columns > MOST => Observe::Numbers,
            (_, observe) => observe,
        };
        self.forward(low, Phase::Evaluation, &observe).seen
    }

    /// Each row: an image enlarged by a bicubic filter, by the network, and as it is.
    fn images(&self, batch: &Images) -> Option<ImageRows> {
        /// Rows; chosen by us.
        const MOST: usize = 4;
        let high = batch.tensor(&self.device()).narrow(0, 0, batch.len().min(MOST));
        let images = self.compare(high).images.into_iter().flatten().collect();
        Some(ImageRows { images, height: batch.height, width: batch.width, across: 3 })
    }
}
