//! The laws of sites: what is read changes nothing, and what is changed changes no more than it says.

use burn::tensor::Tensor;
use polyhead_kernels::comparison::{largest_difference, numbers};

use super::{Law, World, close, draw};
use crate::{
    Amount, At, Change, Edit, KvHead, KvSite, LayerCache, LayerSites, Mask, Positions, QueryHead, QuerySite, Site,
    Wiring,
};

pub(super) const LAWS: &[Law] = &[
    ("sites_read", reading_sites_changes_nothing),
    ("sites_zeroed", zeroed_heads_write_nothing),
    ("sites_patched", patching_everything_gives_the_other_run),
    ("sites_heads", an_edit_of_a_head_stays_with_it),
    ("sites_wiring", an_edit_of_a_key_head_reaches_the_heads_that_read_it),
    ("sites_no_look_ahead", nobody_looks_ahead_through_an_edit),
    ("sites_cached_decoding", cached_decoding_equals_the_full_pass_under_edits),
    ("sites_bias", a_bias_is_a_factor_of_weights),
];

impl World {
    /// The sites that the mechanism has.
    fn sites(&self) -> Vec<Site> {
        let of_heads = Site::all().filter(|site| !matches!(site, Site::Stream(_)));
        of_heads.filter(|&site| self.config.absent(site).is_none()).collect()
    }

    /// The output under some edits, those of sites that are not there left out, and what was read.
    fn edited(&self, x: Tensor<3>, edits: &[Edit], taps: &[Site]) -> (Tensor<3>, Vec<(Site, Tensor<4>)>) {
        self.edited_call(x, edits, taps, None)
    }

    fn edited_call(
        &self,
        x: Tensor<3>,
        edits: &[Edit],
        taps: &[Site],
        cache: Option<&mut LayerCache>,
    ) -> (Tensor<3>, Vec<(Site, Tensor<4>)>) {
        let there = |edit: &&Edit| self.config.absent(edit.at.site()).is_none();
        let edits = edits.iter().filter(there).cloned().collect();
        let start = cache.as_ref().map_or(0, |cache| cache.len());
        let sites = LayerSites::new(start, edits, taps.to_vec());
        let out = self.run_with_sites(x, &Mask::causal(), cache, &sites).hidden;
        (out, sites.into_read())
    }

    /// The output and the head outputs before the output projection, `[batch, heads, seq, width]`.
    fn z(&self, x: &Tensor<3>, edits: &[Edit]) -> Tensor<4> {
        let (_, read) = self.edited(x.clone(), edits, &[QuerySite::Z.into()]);
        read.into_iter().next().expect("every mechanism has z").1
    }

    /// The numbers of every query head of `site` scaled by 3, for each head.
    fn of_each_head(&self, x: &Tensor<3>, site: QuerySite) -> Vec<Edit> {
        let (_, read) = self.edited(x.clone(), &[], &[site.into()]);
        let heads = read.first().map_or(0, |(_, values)| values.dims()[1]);
        (0..heads).map(|head| Edit::new(At::Query(site, vec![QueryHead(head)]), Change::scale(3.0))).collect()
    }
}

fn reading_sites_changes_nothing(world: &World) {
    let x = world.input(2, 5);
    let (out, read) = world.edited(x.clone(), &[], &Site::all().collect::<Vec<_>>());
    let weights = read.iter().any(|(site, _)| site.is_map());
    // Where there is a map, it was made as a matrix: the same numbers by other sums.
    match weights {
        true => close(out, world.causal(x.clone())),
        false => out.into_data().assert_eq(&world.causal(x.clone()).into_data(), true),
    }
    let mut found: Vec<Site> = read.iter().map(|(site, _)| *site).collect();
    found.sort_unstable();
    let mut expected = world.sites();
    expected.sort_unstable();
    assert_eq!(found, expected, "{} says of the others why they are not there", world.config.name());
    for (site, values) in &read {
        let [batch, _, rows, _] = values.dims();
        assert_eq!([batch, rows], [2, 5], "{site}");
    }
    let rest: Vec<Site> = expected.into_iter().filter(|site| !site.is_map()).collect();
    let (out, read) = world.edited(x.clone(), &[], &rest);
    out.into_data().assert_eq(&world.causal(x.clone()).into_data(), true);
    let of = |site: QuerySite| read.iter().find(|(other, _)| *other == site.into()).map(|(_, values)| values.clone());
    if let Some(result) = of(QuerySite::Result) {
        let unbiased = world.without_output_bias().causal(x);
        close(result.sum_dim(1).squeeze_dim::<3>(1), unbiased);
    }
}

fn zeroed_heads_write_nothing(world: &World) {
    let world = world.without_output_bias();
    let zeroed = Edit::new(At::all(QuerySite::Z.into()), Change::scale(0.0));
    let (out, _) = world.edited(world.input(2, 5), &[zeroed], &[]);
    assert!(numbers(out).into_iter().all(|value| value == 0.0), "heads of zeros write nothing");
}

fn patching_everything_gives_the_other_run(world: &World) {
    let (x, other) = (world.input(2, 6), world.input(2, 6));
    let (want, read) = world.edited(other, &[], &world.sites());
    let patch = |(site, values): &(Site, Tensor<4>)| Edit::new(At::all(*site), Change::replace(values.clone()));
    let all: Vec<Edit> = read.iter().map(patch).collect();
    let (got, _) = world.edited(x.clone(), &all, &[]);
    close(got, want.clone());
    let (z, _) = world.edited(x.clone(), &all[all.len() - 1..], &[]);
    assert!(largest_difference(world.causal(x), want.clone()) > 1e-3, "the runs must differ");
    close(z, want);
}

/// The heads of one site in which two runs differ.
fn changed(a: &Tensor<4>, b: &Tensor<4>) -> Vec<usize> {
    let of = |x: &Tensor<4>, head: usize| numbers(x.clone().narrow(1, head, 1));
    (0..a.dims()[1]).filter(|&head| of(a, head) != of(b, head)).collect()
}

/// An edit of an output changes this output; one of a query head the outputs that it is part of.
fn an_edit_of_a_head_stays_with_it(world: &World) {
    let x = world.input(1, 5);
    let clean = world.z(&x, &[]);
    for (head, edit) in world.of_each_head(&x, QuerySite::Z).into_iter().enumerate() {
        assert_eq!(changed(&world.z(&x, &[edit]), &clean), [head], "z of head {head}");
    }
    let Ok(wiring) = world.config.wiring() else { return };
    for site in [QuerySite::Q, QuerySite::RotQ, QuerySite::Scores, QuerySite::Weights, QuerySite::Attended] {
        if world.config.absent(site.into()).is_some() {
            continue;
        }
        let edits = world.of_each_head(&x, site);
        assert_eq!(edits.len(), wiring.len(), "{site:?}: a wire for each head");
        for (head, edit) in edits.into_iter().enumerate() {
            let got = match site {
                // With the map as a matrix in both runs, so that bits can be compared.
                QuerySite::Scores | QuerySite::Weights => {
                    let keep = Edit { change: Change::With(std::sync::Arc::new(|x, _| x)), ..edit.clone() };
                    changed(&world.z(&x, &[keep]), &world.z(&x, &[edit]))
                }
                _ => changed(&world.z(&x, &[edit]), &clean),
            };
            assert_eq!(got, wiring[head].outputs.clone().collect::<Vec<_>>(), "{site:?} of head {head}");
        }
    }
}

/// An edit of a key or value head changes what those query heads attend to that read it, and no other.
fn an_edit_of_a_key_head_reaches_the_heads_that_read_it(world: &World) {
    let Ok(wiring) = world.config.wiring() else { return };
    let x = world.input(2, 6);
    let attended = |edits: &[Edit]| world.edited(x.clone(), edits, &[QuerySite::Attended.into()]).1.remove(0).1;
    let clean = attended(&[]);
    for site in [KvSite::K, KvSite::RotK, KvSite::V] {
        let (_, read) = world.edited(x.clone(), &[], &[site.into()]);
        let heads = read.first().map_or(0, |(_, values)| values.dims()[1]);
        assert_eq!(heads == 0, world.config.absent(site.into()).is_some());
        for head in (0..heads).map(KvHead) {
            let reads = |own: &Wiring| if site == KvSite::V { own.value == head } else { own.key == head };
            let want: Vec<usize> = (0..wiring.len()).filter(|&query| reads(&wiring[query])).collect();
            assert!(!want.is_empty(), "{site:?} of {head:?} is read by nobody");
            let edit = Edit::new(At::Kv(site, vec![head]), Change::scale(3.0));
            assert_eq!(changed(&attended(&[edit]), &clean), want, "{site:?} of {head:?}");
        }
    }
}

/// Edits of all kinds, as far as the mechanism has their sites.
fn all_kinds(world: &World, seq: usize) -> Vec<Edit> {
    let random = |shape: [usize; 4]| Amount::Each(draw(shape, [1.0, 0.5], &world.device));
    let query = |site, head| At::Query(site, vec![QueryHead(head)]);
    let of_span = |edit| Edit { positions: Positions::Range(2..6), keys: Positions::Range(1..4), ..edit };
    let marks: Vec<bool> = (0..seq).map(|position| position % 3 != 1).collect();
    let marked = Positions::Rows { rows: vec![marks].into(), beyond: true };
    let gate = random([1, 1, 1, 1]);
    let clamped = |site: Site| {
        let (_, read) = world.edited(world.input(1, 2), &[], &[site]);
        let width = read.first().map_or(1, |(_, values)| values.dims()[3]);
        let direction: Tensor<1> = draw([width], [0.0, 1.0], &world.device);
        let length = direction.clone().square().sum().sqrt();
        Edit::new(At::all(site), Change::Clamp { direction: direction / length, to: 0.5 })
    };
    vec![
        of_span(Edit::new(query(QuerySite::Scores, 1), Change::add(Amount::Number(1.5)))),
        Edit::new(At::all(QuerySite::Scores.into()), Change::add(random([1, 1, seq, seq]))),
        of_span(Edit::new(At::all(QuerySite::Weights.into()), Change::Reweight(Amount::Number(3.0)))),
        // Weights where the mask has none.
        Edit::new(query(QuerySite::Weights, 0), Change::Affine { gate, value: random([1, 1, seq, seq]) }),
        Edit { positions: marked, ..Edit::new(query(QuerySite::Z, 0), Change::scale(-1.0)) },
        Edit::new(At::all(QuerySite::Z.into()), Change::add(random([1, 1, 4, 1]))),
        of_span(Edit::new(At::Kv(KvSite::V, vec![KvHead(0)]), Change::scale(2.0))),
        Edit::new(At::Kv(KvSite::RotK, vec![KvHead(0)]), Change::add(random([1, 1, seq, 1]))),
        Edit::new(query(QuerySite::Q, 1), Change::scale(0.5)),
        of_span(Edit::new(At::all(QuerySite::Result.into()), Change::scale(1.25))),
        of_span(clamped(KvSite::V.into())),
        of_span(clamped(QuerySite::Attended.into())),
        clamped(QuerySite::Z.into()),
    ]
}

fn nobody_looks_ahead_through_an_edit(world: &World) {
    let edits = all_kinds(world, 7);
    let x = world.input(2, 7);
    let other = Tensor::cat(vec![x.clone().narrow(1, 0, 4), world.input(2, 3)], 1);
    let [a, b] = [x, other].map(|x| world.edited(x, &edits, &[]).0);
    close(a.clone().narrow(1, 0, 4), b.clone().narrow(1, 0, 4));
    assert!(largest_difference(a.narrow(1, 4, 3), b.narrow(1, 4, 3)) > 1e-3, "the change must be visible behind");
}

fn cached_decoding_equals_the_full_pass_under_edits(world: &World) {
    let (x, edits) = (world.input(2, 9), all_kinds(world, 9));
    let mut cache = LayerCache::default();
    let mut parts = Vec::new();
    for (start, length) in [(0, 4), (4, 1), (5, 3), (8, 1)] {
        let part = x.clone().narrow(1, start, length);
        parts.push(world.edited_call(part, &edits, &[], Some(&mut cache)).0);
    }
    let (whole, _) = world.edited(x.clone(), &edits, &[]);
    assert!(largest_difference(whole.clone(), world.causal(x)) > 1e-3, "the edits must be visible");
    close(Tensor::cat(parts, 1), whole);
}

/// Adding ln f to scores is multiplying weights by f and bringing rows back to their sum; through the kernel's bias, and as a
/// matrix, with the same gradient.
fn a_bias_is_a_factor_of_weights(world: &World) {
    if world.config.absent(QuerySite::Scores.into()).is_some() {
        return;
    }
    let x = world.input(2, 6);
    let span = |change| {
        let at = At::Query(QuerySite::Scores, vec![QueryHead(0), QueryHead(3)]);
        Edit { keys: Positions::Range(0..2), ..Edit::new(at, change) }
    };
    let bias: Tensor<4> = draw([1, 1, 1, 1], [1.0, 0.1], &world.device).require_grad();
    let run = |taps: &[Site]| {
        let (out, _) = world.edited(x.clone(), &[span(Change::add(Amount::Each(bias.clone())))], taps);
        let cotangent = Tensor::<1, burn::tensor::Int>::arange(0..out.shape().num_elements() as i64, &world.device);
        let grads = (out.clone() * cotangent.float().reshape(out.dims()).sin()).sum().backward();
        (out, bias.grad(&grads).expect("the bias has a gradient").into_scalar::<f32>())
    };
    let ((fused, slope), (matrix, other)) = (run(&[]), run(&[QuerySite::Weights.into()]));
    close(fused.clone(), matrix);
    assert!(slope != 0.0 && (slope - other).abs() <= 1e-4 * (1.0 + slope.abs()), "{slope} {other}");
    assert!(largest_difference(fused.clone(), world.causal(x.clone())) > 1e-4, "the bias must be visible");
    // A sink takes part in the softmax, and has no weight to bring back.
    if world.config.name() != "sink" {
        let at = At::Query(QuerySite::Weights, vec![QueryHead(0), QueryHead(3)]);
        let factor = Change::Reweight(Amount::Each(bias.clone().detach().exp()));
        let edit = Edit { keys: Positions::Range(0..2), ..Edit::new(at, factor) };
        close(world.edited(x, &[edit], &[]).0, fused);
    }
}
