//! What is read and changed on the way through the layers of a model: the [sites](polyhead_attention::Site) of its layers
//! together.

use burn::tensor::Tensor;
use polyhead_attention::{At, Change, Edit, LayerSites, Site};

/// What is read and changed in the layers of a model during one pass.
#[derive(Debug, Clone, Default)]
pub struct SitePlan {
    /// The changes, each with its layer.
    pub edits: Vec<(usize, Edit)>,
    /// The sites to read, each with its layer.
    pub taps: Vec<(usize, Site)>,
}

/// What was read at a site.
#[derive(Debug, Clone)]
pub struct Tap {
    /// The layer, from 0.
    pub layer: usize,
    /// The site.
    pub site: Site,
    /// `[batch, heads, seq, width]`, of a map `[batch, heads, queries, keys]`, of the residual stream `[batch, 1, seq, width]`.
    pub values: Tensor<4>,
}

impl Tap {
    pub(crate) fn of_layer(layer: usize, sites: LayerSites) -> impl Iterator<Item = Self> {
        sites.into_read().into_iter().map(move |(site, values)| Self { layer, site, values })
    }

    /// The change that puts these numbers in the place of another run's.
    pub fn patch(&self) -> (usize, Edit) {
        (self.layer, Edit::new(At::all(self.site), Change::replace(self.values.clone())))
    }
}

impl SitePlan {
    /// Reads one site in every layer.
    pub fn tap_all(n_layers: usize, site: impl Into<Site>) -> Self {
        let site = site.into();
        Self { edits: Vec::new(), taps: (0..n_layers).map(|layer| (layer, site)).collect() }
    }

    /// What is asked for of one layer, in a call that begins at `start`.
    pub(crate) fn of_layer(&self, layer: usize, start: usize) -> Option<LayerSites> {
        let edits: Vec<Edit> = self.edits.iter().filter(|(at, _)| *at == layer).map(|(_, edit)| edit.clone()).collect();
        let taps: Vec<Site> = self.taps.iter().filter(|(at, _)| *at == layer).map(|(_, site)| *site).collect();
        (!edits.is_empty() || !taps.is_empty()).then(|| LayerSites::new(start, edits, taps))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::{Device, Int, TensorData};
    use polyhead_attention::{Cache, Mask, Positions, QuerySite, StreamSite};
    use polyhead_kernels::comparison::{Tolerance, assert_tensors_close, largest_difference};

    use super::*;
    use crate::testing::decoders;
    use crate::{Decoder, Pass};

    fn ids(ids: &[i32]) -> Tensor<2, Int> {
        Tensor::from_data(TensorData::new(ids.to_vec(), [1, ids.len()]), &Device::flex())
    }

    fn run(model: &Decoder, tokens: &[i32], sites: SitePlan) -> (Tensor<3>, Vec<Tap>) {
        let forward = model.pass(ids(tokens), Pass { sites, ..Pass::new(&Mask::causal()) });
        (model.logits(forward.hidden), forward.taps)
    }

    #[test]
    fn patching_everything_gives_the_other_runs_logits() {
        let [here, there] = [[1, 2, 3, 4, 5, 6], [9, 0, 7, 3, 8, 2]];
        for model in decoders() {
            let name = model.config().mechanism(0).name();
            let (clean, _) = run(&model, &here, SitePlan::default());
            let taps = (0..4).flat_map(|layer| Site::all().map(move |site| (layer, site))).collect();
            let (want, read) = run(&model, &there, SitePlan { edits: Vec::new(), taps });
            assert!(largest_difference(clean.clone(), want.clone()) > 1e-3, "{name}");
            let changeable = |tap: &&Tap| !tap.site.is_read_only();
            let edits: Vec<(usize, Edit)> = read.iter().filter(changeable).map(Tap::patch).collect();
            let close = |got| assert_tensors_close(name, got, want.clone(), Tolerance::absolute(2e-5));
            close(run(&model, &here, SitePlan { edits, taps: Vec::new() }).0);
            // The stream alone is enough, behind the last layer or before the first; and nothing less.
            for (layer, site) in [(3, StreamSite::ResidPost), (0, StreamSite::ResidPre)] {
                let of = |tap: &&Tap| tap.layer == layer && tap.site == site.into();
                let edits = read.iter().filter(of).map(Tap::patch).collect();
                close(run(&model, &here, SitePlan { edits, taps: Vec::new() }).0);
            }
            let again = run(&model, &here, SitePlan::default()).0;
            again.into_data().assert_eq(&clean.into_data(), true);
        }
    }

    #[test]
    fn cached_decoding_equals_the_full_pass_under_edits() {
        let tokens = [1, 2, 3, 4, 5, 6, 7];
        for model in decoders() {
            let name = model.config().mechanism(0).name();
            let of_span = |edit| Edit { positions: Positions::Range(2..6), ..edit };
            let edits = vec![
                (1, of_span(Edit::new(At::all(QuerySite::Z.into()), Change::scale(2.0)))),
                (2, of_span(Edit::new(At::Stream(StreamSite::ResidMid), Change::scale(0.5)))),
                (3, of_span(Edit::new(At::Stream(StreamSite::MlpOut), Change::scale(0.0)))),
            ];
            let sites = SitePlan { edits, taps: Vec::new() };
            let (want, _) = run(&model, &tokens, sites.clone());
            let mut cache = Cache::new(4);
            let mask = Mask::causal();
            let parts: Vec<Tensor<3>> = [0..3, 3..4, 4..7]
                .into_iter()
                .map(|range| {
                    let pass = Pass { sites: sites.clone(), cache: Some(&mut cache), ..Pass::new(&mask) };
                    model.logits(model.pass(ids(&tokens[range]), pass).hidden)
                })
                .collect();
            assert_tensors_close(name, Tensor::cat(parts, 1), want.clone(), Tolerance::absolute(2e-5));
            assert!(largest_difference(run(&model, &tokens, SitePlan::default()).0, want) > 1e-3, "{name}");
        }
    }
}
