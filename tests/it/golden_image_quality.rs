//! Images at other sizes by PyTorch, and how near they are by scikit-image; see `tests/golden/image_quality/README.md`.

use burn::tensor::{Device, Tensor};
use polyhead_models::super_resolution::{Quality, quality};
use polyhead_models::{Filter, resampled};

use crate::golden::{compare, files, size, tensor, values};

#[test]
fn golden_image_quality() {
    for golden in &files("image_quality") {
        let (name, file) = (&golden.name, &golden.tensors);
        let x: Tensor<4> = tensor(file, "x", &Device::flex());
        for (key, filter) in [
            ("after.bicubic_down", Filter::Bicubic),
            ("after.bicubic_up", Filter::Bicubic),
            ("after.bilinear_up", Filter::Bilinear),
        ] {
            let [_, _, height, width] = file[key].shape[..] else { panic!("{name}: {key} is no image") };
            let got = values(resampled(x.clone(), [height, width], filter));
            compare(name, key, &file[key].values, &got, 2e-6, false);
        }
        let image = |key: &str| file[key].values.as_slice();
        let sizes = ["height", "width"].map(|key| size(&golden.config, key));
        let Quality { psnr, ssim } = quality(image("x"), image("y"), sizes, size(&golden.config, "border"));
        for (key, got) in [("after.psnr", psnr), ("after.ssim", ssim)] {
            compare(name, key, image(key), &[got as f32], 1e-6, true);
        }
    }
}
