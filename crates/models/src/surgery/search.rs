//! Sharing a budget of heads over cells. A cell is the keys or the values of a layer; cells come as (layer 0, keys),
//! (layer 0, values), (layer 1, keys), ...

use rayon::prelude::*;

use super::heads::{Heads, Merge, labels_after};

/// The labels of every cell's heads after the static search: of all merges of all cells, the cheapest are made until
/// `budget` heads are left. Ward's costs grow within a cell, so that this leaves the least scatter in all that greedy
/// agglomeration can.
pub fn search(cells: &[Heads], budget: usize) -> Vec<Vec<usize>> {
    let merges: Vec<Vec<Merge>> = cells.par_iter().map(Heads::agglomerate).collect();
    let counts = allocate(&merges, budget);
    let labels = |(cell, count): (usize, usize)| {
        let n = cells[cell].len();
        labels_after(n, &merges[cell][..n - count])
    };
    counts.into_iter().enumerate().map(labels).collect()
}

/// How many heads each cell keeps of `budget` in all, from its merges.
pub fn allocate(merges: &[Vec<Merge>], budget: usize) -> Vec<usize> {
    let mut all: Vec<(f64, usize, usize)> = Vec::new();
    for (cell, merges) in merges.iter().enumerate() {
        // Rounding may let a later merge look cheaper than an earlier one, which it needs.
        let mut dearest = f64::NEG_INFINITY;
        for (order, merge) in merges.iter().enumerate() {
            dearest = dearest.max(merge.cost);
            all.push((dearest, cell, order));
        }
    }
    all.sort_by(|a, b| a.0.total_cmp(&b.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    let mut counts: Vec<usize> = merges.iter().map(|merges| merges.len() + 1).collect();
    let too_many = counts.iter().sum::<usize>().saturating_sub(budget);
    for &(_, cell, _) in all.iter().take(too_many) {
        counts[cell] -= 1;
    }
    counts
}

/// How many heads each cell keeps of `budget` in all: one, and of the others a share in proportion to its `need` (what was
/// left to fuse after a first attempt), at most `heads`; largest remainder first, ties to the earlier cell.
pub fn allocate_by_need(need: &[f64], heads: usize, budget: usize) -> Vec<usize> {
    let cells = need.len();
    let mut counts = vec![1; cells];
    let mut free = budget.clamp(cells, cells * heads) - cells;
    let mut open: Vec<usize> = (0..cells).collect();
    loop {
        let sum: f64 = open.iter().map(|&cell| need[cell]).sum();
        let all = free as f64;
        let share = |cell: usize| if sum > 0.0 { all * need[cell] / sum } else { all / open.len() as f64 };
        // Cells that would get more than all their heads keep all of them; the others share what that leaves.
        let (full, rest): (Vec<usize>, Vec<usize>) = open.iter().partition(|&&cell| share(cell) >= (heads - 1) as f64);
        if full.is_empty() {
            let mut by_remainder = rest.clone();
            by_remainder.sort_by(|&a, &b| share(b).fract().total_cmp(&share(a).fract()).then(a.cmp(&b)));
            let whole: usize = rest.iter().map(|&cell| share(cell) as usize).sum();
            rest.iter().for_each(|&cell| counts[cell] += share(cell) as usize);
            by_remainder.iter().take(free - whole).for_each(|&cell| counts[cell] += 1);
            return counts;
        }
        full.iter().for_each(|&cell| counts[cell] = heads);
        free -= full.len() * (heads - 1);
        open = rest;
        if open.is_empty() {
            return counts;
        }
    }
}
