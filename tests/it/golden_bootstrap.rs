//! Intervals of a bootstrap by scipy; see `tests/golden/bootstrap/README.md`.

use polyhead_evaluation::templates::MeanInterval;

use crate::golden::{compare, files, size};

/// Of the width of the interval: what 10,000 resamples leave to chance.
const CHANCE: f64 = 0.025;

#[test]
fn golden_bootstrap() {
    for golden in &files("bootstrap") {
        let (name, file) = (&golden.name, &golden.tensors);
        let values = file.wide("values");
        assert_eq!(values.len(), size(&golden.config, "n"), "{name}");
        let MeanInterval { mean, interval } = MeanInterval::of(values, 3).unwrap();
        compare(name, "mean", &file["after.mean"].values, &[mean as f32], 1e-6, false);
        let want = file.wide("after.interval");
        let tolerance = (CHANCE * (want[1] - want[0])) as f32;
        compare(name, "interval", &file["after.interval"].values, &interval.map(|end| end as f32), tolerance, false);
    }
}
