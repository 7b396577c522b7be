//! Linear maps through Burn's products and through cuBLASLt: how fast, and how far apart.

use burn::tensor::{DType, Device, Tensor};
use polyhead_kernels::comparison::numbers;
use polyhead_kernels::{find_cublaslt, in_type, linear, use_cublaslt};

use crate::{Outcome, PRODUCTS, random, seconds, types};

/// The largest difference that is allowed, of the largest entry.
fn tolerance(dtype: DType) -> f32 {
    if dtype == DType::F32 { 1e-4 } else { 2e-2 }
}

/// # Errors
/// If the library is not there, or its numbers are too far from Burn's.
pub fn compare(device: &Device, small: bool) -> Outcome<()> {
    find_cublaslt(device)?;
    println!(
        "| linear map | type | by | forward ms | TFLOP/s | both ms | TFLOP/s | apart |\n|---|---|---|---|---|---|---|---|"
    );
    let mut too_far = Vec::new();
    for dtype in types(device) {
        let mut gains = [Vec::new(), Vec::new()];
        for sizes in PRODUCTS.map(|sizes| sizes.map(|size| if small { size / 32 } else { size })) {
            let map = Map::new(sizes, dtype, device);
            let [burn, library] = [false, true].map(|library| {
                use_cublaslt(library);
                (map.results(), map.times())
            });
            use_cublaslt(false);
            let apart = difference(&library.0, &burn.0);
            let name = format!("{} x {} x {} | {dtype:?}", sizes[0], sizes[1], sizes[2]);
            map.tell(&name, "Burn", burn.1, "");
            map.tell(&name, "cuBLASLt", library.1, &format!("{apart:.1e}"));
            // NaN is too far, too.
            if !(0.0..=tolerance(dtype)).contains(&apart) {
                too_far.push(format!("{name}: {apart:.1e}"));
            }
            for (gains, (burn, library)) in gains.iter_mut().zip(burn.1.into_iter().zip(library.1)) {
                gains.push(burn / library);
            }
        }
        let [forward, both] =
            gains.map(|gains| (gains.iter().map(|gain| gain.ln()).sum::<f64>() / gains.len() as f64).exp());
        println!(
            "{dtype:?}: cuBLASLt is {forward:.2} times as fast forward, {both:.2} times with the backward (geometric means)"
        );
    }
    if too_far.is_empty() { Ok(()) } else { Err(format!("too far from Burn's: {}", too_far.join("; ")).into()) }
}

/// A linear map whose gradients are wanted, and the gradient of its output.
struct Map {
    device: Device,
    sizes: [usize; 3],
    x: Tensor<2>,
    weight: Tensor<2>,
    y_grad: Tensor<2>,
}

impl Map {
    fn new([rows, d_input, d_output]: [usize; 3], dtype: DType, device: &Device) -> Self {
        let tracked = device.clone().autodiff();
        Self {
            device: device.clone(),
            sizes: [rows, d_input, d_output],
            x: random([rows, d_input], dtype, &tracked).require_grad(),
            weight: random([d_input, d_output], dtype, &tracked).require_grad(),
            y_grad: random([rows, d_output], dtype, &tracked),
        }
    }

    /// The output, the gradient of the input, and that of the weight.
    fn results(&self) -> [Tensor<2>; 3] {
        let y = linear(self.x.clone(), self.weight.clone(), None);
        let grads = (y.clone() * self.y_grad.clone()).sum().backward();
        let grad = |leaf: &Tensor<2>| leaf.grad(&grads).unwrap_or_else(|| panic!("no gradient"));
        [y.inner(), grad(&self.x), grad(&self.weight)]
    }

    /// Seconds of a forward pass, and of one with its backward.
    fn times(&self) -> [f64; 2] {
        let [x, weight] = [&self.x, &self.weight].map(|leaf| leaf.clone().inner());
        let forward = seconds(&self.device, || drop(linear(x.clone(), weight.clone(), None)));
        [forward, seconds(&self.device, || drop(self.results()))]
    }

    fn tell(&self, name: &str, by: &str, [forward, both]: [f64; 2], apart: &str) {
        let flops = 2.0 * self.sizes.iter().map(|&size| size as f64).product::<f64>();
        let speed = |products: f64, time: f64| products * flops / time / 1e12;
        println!(
            "| {name} | {by} | {:.3} | {:.1} | {:.3} | {:.1} | {apart} |",
            1e3 * forward,
            speed(1.0, forward),
            1e3 * both,
            speed(3.0, both)
        );
    }
}

/// The largest difference of any of them, of the largest entry; NaN if there is one.
fn difference(found: &[Tensor<2>; 3], expected: &[Tensor<2>; 3]) -> f32 {
    let largest = |x: Tensor<2>| numbers(x.abs().max())[0];
    let differences = found.iter().zip(expected).map(|(found, expected)| {
        let [found, expected] = [found, expected].map(|x| in_type(x.clone(), DType::F32));
        largest(found - expected.clone()) / largest(expected)
    });
    // `f32::max` would drop a NaN.
    differences.fold(0.0, |worst, next| if next <= worst { worst } else { next })
}
