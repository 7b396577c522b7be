//! How near an image is to another one, on brightness alone, as papers about super-resolution measure it (BasicSR): of images in
//! steps of 1/255, without a border of as many pixels as the image was enlarged by.
//!
//! ```text
//! Y = 16 + 65.481 R + 128.553 G + 24.966 B          ITU-R BT.601, R, G and B from 0 to 1, Y from 16 to 235
//! PSNR = 10 log10(255² / mean (Y - Y')²)
//! SSIM = mean of (2 μ μ' + C1)(2 σσ' + C2) / ((μ² + μ'² + C1)(σ² + σ'² + C2))   Wang et al. 2004: Gaussian window of
//!        11 x 11 pixels, σ = 1.5, where it lies inside the image; C1 = (0.01 · 255)², C2 = (0.03 · 255)²
//! ```

use serde::{Deserialize, Serialize};

/// Side of SSIM's window.
pub const WINDOW: usize = 11;
/// PSNR of equal images, which has no bound; chosen by us.
const EQUAL: f64 = 100.0;

/// How near an image is to another one.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Quality {
    /// Peak signal-to-noise ratio in dB.
    pub psnr: f64,
    /// Structural similarity, at most 1.
    pub ssim: f64,
}

/// A value from 0 to 1 as images store it, in steps of 1/255.
pub fn stored(value: f32) -> u8 {
    (value.clamp(0.0, 1.0) * 255.0).round() as u8
}

/// How near an image is to the true one.
///
/// # Shapes
/// - image, truth: `[3, height, width]`, from 0 to 1
///
/// # Panics
/// If less than the window is left inside of the border.
pub fn quality(image: &[f32], truth: &[f32], size: [usize; 2], border: usize) -> Quality {
    let [ours, theirs] = [image, truth].map(|pixels| brightness(pixels, size, border));
    Quality { psnr: psnr(&ours.values, &theirs.values), ssim: ssim(&ours, &theirs) }
}

/// Brightness row by row.
struct Plane {
    width: usize,
    values: Vec<f64>,
}

fn brightness(pixels: &[f32], [height, width]: [usize; 2], border: usize) -> Plane {
    let area = height * width;
    let of = |at: usize| {
        let [r, g, b] = [0, 1, 2].map(|channel| f64::from(stored(pixels[channel * area + at])) / 255.0);
        16.0 + 65.481 * r + 128.553 * g + 24.966 * b
    };
    let row = |y: usize| (border..width - border).map(move |x| y * width + x);
    Plane { width: width - 2 * border, values: (border..height - border).flat_map(row).map(of).collect() }
}

fn psnr(ours: &[f64], theirs: &[f64]) -> f64 {
    let squares: f64 = ours.iter().zip(theirs).map(|(a, b)| (a - b) * (a - b)).sum();
    let mean = squares / ours.len() as f64;
    if mean == 0.0 { EQUAL } else { (10.0 * (255.0 * 255.0 / mean).log10()).min(EQUAL) }
}

fn ssim(a: &Plane, b: &Plane) -> f64 {
    let [c1, c2] = [0.01f64, 0.03].map(|k| (k * 255.0).powi(2));
    let product = |x: &Plane, y: &Plane| {
        let values = x.values.iter().zip(&y.values).map(|(x, y)| x * y).collect();
        smooth(&Plane { width: x.width, values })
    };
    let [mean_a, mean_b] = [a, b].map(smooth);
    let [aa, bb, ab] = [product(a, a), product(b, b), product(a, b)];
    let of = |at: usize| {
        let (m, n) = (mean_a[at], mean_b[at]);
        let [va, vb, covariance] = [aa[at] - m * m, bb[at] - n * n, ab[at] - m * n];
        (2.0 * m * n + c1) * (2.0 * covariance + c2) / ((m * m + n * n + c1) * (va + vb + c2))
    };
    (0..mean_a.len()).map(of).sum::<f64>() / mean_a.len() as f64
}

/// Gaussian means over windows, where they lie inside.
fn smooth(plane: &Plane) -> Vec<f64> {
    let gaussian: Vec<f64> = (0..WINDOW).map(|at| (-(at as f64 - 5.0).powi(2) / (2.0 * 1.5 * 1.5)).exp()).collect();
    let sum: f64 = gaussian.iter().sum();
    let weights: Vec<f64> = gaussian.into_iter().map(|weight| weight / sum).collect();
    let mean = |values: &dyn Fn(usize) -> f64| weights.iter().enumerate().map(|(at, weight)| weight * values(at)).sum();
    let inside = plane.width + 1 - WINDOW;
    let lines: Vec<f64> = plane
        .values
        .chunks(plane.width)
        .flat_map(|row| (0..inside).map(move |x| (row, x)))
        .map(|(row, x)| mean(&|at| row[x + at]))
        .collect();
    let height = lines.len() / inside + 1 - WINDOW;
    (0..height * inside).map(|place| mean(&|at| lines[place + at * inside])).collect()
}
