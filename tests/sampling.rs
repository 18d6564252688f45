//! Sampling: drawn tokens follow the softmax that temperature, top-k, top-p and min-p leave, and
//! the pruned search for the largest perturbed logit finds what a search of every entry finds.

#[allow(dead_code, reason = "shared by several test binaries")]
mod common;
#[allow(dead_code, reason = "shared by several test binaries")]
mod reference;
#[path = "operations/tools.rs"]
#[allow(dead_code, reason = "shared by several test binaries")]
mod tools;

use half::bf16;
use inkling::{
    device::Device,
    ops::{
        philox,
        rows::NONE,
        sample::{Draw, Draws, NO_TOKEN, sample},
    },
};
use reference::sampling::{Filter, probabilities, word};
use tools::{
    Numbers, close, kernel_devices, on_every_device, on_every_isa, read_u32, upload, widen,
};

/// Drawn for each test of a distribution.
const DRAWS: u32 = 20_000;
/// Standard normal quantile of the largest χ² that passes: once in 30,000 tests by chance.
const QUANTILE: f64 = 4.0;
const GREEDY: Draw = Draw {
    row: 0,
    slot: NONE,
    seed: 1,
    index: 0,
    temperature: 0.0,
    top_k: 0,
    top_p: 1.0,
    min_p: 0.0,
};
const PLAIN: Draw = Draw { temperature: 1.0, ..GREEDY };

/// The tokens of these draws, the same on every device. Of very many, kernels make some.
fn tokens(rows: &[Vec<f32>], draws: &[Draw]) -> Vec<usize> {
    let vocab = rows[0].len();
    let sample = |device: &Device, draws: &[Draw]| {
        let logits = upload::<f32>(device, &rows.concat(), 0);
        let mut all = Draws::new(device, draws.len(), 1).unwrap();
        all.set(draws).unwrap();
        sample(device, vocab, &logits, &mut all).unwrap();
        read_u32(&all.tokens)
    };
    let outputs = on_every_isa(0, |device| {
        vec![sample(device, draws).iter().map(|&token| token as f32).collect()]
    });
    let every = draws.len().div_ceil(400);
    let some: Vec<Draw> = draws.iter().step_by(every).copied().collect();
    for (name, device) in kernel_devices() {
        let got = sample(&device, &some);
        for ((draw, got), want) in some.iter().zip(got).zip(outputs[0].iter().step_by(every)) {
            assert_eq!(got as f32, *want, "{name}: another token than the processor's, {draw:?}");
        }
    }
    outputs[0].iter().map(|&token| token as usize).collect()
}

#[test]
fn the_last_token_of_a_slot_is_kept_for_its_next_row() {
    on_every_device::<bf16>(0, |device| {
        let logits = upload::<f32>(device, &[1.0, 5.0, 2.0, 9.0, 0.0, 0.0], 0);
        let mut draws = Draws::new(device, 4, 3).unwrap();
        draws.last.write(0, &[40, 41, 42]).unwrap();
        let dead = Draw { row: NONE, slot: 1, ..GREEDY };
        let list = [(0, 2), (1, NONE), (1, 0)].map(|(row, slot)| Draw { row, slot, ..GREEDY });
        draws.set(&[&list[..], &[dead]].concat()).unwrap();
        sample(device, 3, &logits, &mut draws).unwrap();
        assert_eq!(read_u32(&draws.last), [0, 41, 1]);
        assert_eq!(read_u32(&draws.tokens), [1, 0, 0, 0]);
        Vec::new()
    });
}

/// 40 logits from 0 to 4.9, all different, in no order.
fn forty() -> Vec<f32> {
    (0..40).map(|id| (id * 17 % 40) as f32 / 8.0).collect()
}

/// χ² of counts against probabilities; entries expected fewer than five times are taken together.
fn check_chi_square(what: &str, counts: &[u32], probabilities: &[f64]) {
    let total = f64::from(counts.iter().sum::<u32>());
    let mut rare = (0.0, 0.0);
    let mut cells = Vec::new();
    for (id, (&count, probability)) in counts.iter().zip(probabilities).enumerate() {
        let (seen, expected) = (f64::from(count), probability * total);
        assert!(count == 0 || expected > 0.0, "{what}: token {id} was filtered out and drawn");
        if expected >= 5.0 {
            cells.push((seen, expected));
        } else if expected > 0.0 {
            rare = (rare.0 + seen, rare.1 + expected);
        }
    }
    if rare.1 > 0.0 {
        cells.push(rare);
    }
    let chi_square: f64 =
        cells.iter().map(|(seen, expected)| (seen - expected).powi(2) / expected).sum();
    // Wilson and Hilferty's quantile.
    let freedom = (cells.len() - 1) as f64;
    let spread = 2.0 / (9.0 * freedom);
    let limit = freedom * (1.0 - spread + QUANTILE * spread.sqrt()).powi(3);
    assert!(cells.len() == 1 || chi_square < limit, "{what}: χ² {chi_square} over {limit}");
}

/// Draws with as many seeds, and with one seed as many tokens of a reply.
fn check_distribution(filter: Filter) {
    let logits = forty();
    let want = probabilities(&widen(&logits), &filter);
    let draw = Draw {
        temperature: filter.temperature as f32,
        top_k: filter.top_k as u32,
        top_p: filter.top_p as f32,
        min_p: filter.min_p as f32,
        ..PLAIN
    };
    let seeds: Vec<Draw> = (0..DRAWS).map(|i| Draw { seed: u64::from(i), ..draw }).collect();
    let reply: Vec<Draw> = (0..DRAWS).map(|index| Draw { seed: 7, index, ..draw }).collect();
    for (name, draws) in [("seeds", seeds), ("tokens of a reply", reply)] {
        let mut counts = vec![0u32; logits.len()];
        for token in tokens(std::slice::from_ref(&logits), &draws) {
            counts[token] += 1;
        }
        check_chi_square(&format!("{filter:?}, {name}"), &counts, &want);
    }
}

const ALL: Filter = Filter { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

#[test]
fn plain_draws_follow_the_softmax() {
    for temperature in [0.7, 1.0, 1.5] {
        check_distribution(Filter { temperature, ..ALL });
    }
}

#[test]
fn top_k_draws_follow_the_softmax_of_what_is_kept() {
    for top_k in [1, 7] {
        check_distribution(Filter { top_k, ..ALL });
    }
}

#[test]
fn top_p_draws_follow_the_softmax_of_what_is_kept() {
    for top_p in [0.5, 0.9] {
        check_distribution(Filter { top_p, ..ALL });
    }
}

#[test]
fn min_p_draws_follow_the_softmax_of_what_is_kept() {
    check_distribution(Filter { min_p: 0.1, ..ALL });
}

#[test]
fn all_filters_together_act_in_transformers_order() {
    check_distribution(Filter { temperature: 0.8, top_k: 20, top_p: 0.9, min_p: 0.2 });
}

#[test]
fn greedy_ties_go_to_the_lowest_id() {
    let mut tied = vec![1.0; 50];
    // In different blocks of 16 lanes, and in the rest behind them.
    for id in [17usize, 33, 49] {
        tied[id] = 2.5;
    }
    let mut last = vec![f32::NEG_INFINITY; 50];
    last[49] = -1e30;
    let rows = [tied, vec![3.0; 50], vec![f32::NEG_INFINITY; 50], last];
    let draws: Vec<Draw> = (0..4).map(|row| Draw { row, ..GREEDY }).collect();
    assert_eq!(tokens(&rows, &draws), [17, 0, NO_TOKEN as f32 as usize, 49]);
    // Filters and seeds change nothing.
    let filtered: Vec<Draw> =
        draws.iter().map(|draw| Draw { seed: 9, top_k: 2, top_p: 0.1, ..*draw }).collect();
    assert_eq!(tokens(&rows, &filtered), [17, 0, NO_TOKEN as f32 as usize, 49]);
    assert_eq!(tokens(&[vec![-0.0, 0.0]], &[GREEDY]), [0]);
}

#[test]
fn an_entry_of_minus_infinity_is_never_drawn() {
    let nothing = vec![f32::NEG_INFINITY; 50];
    let mut one = nothing.clone();
    one[33] = -1e30;
    let rows = [nothing, one];
    let filters = [PLAIN, Draw { top_k: 50, ..PLAIN }, Draw { min_p: 0.1, ..PLAIN }];
    for draw in filters {
        let draws: Vec<Draw> =
            (0..60).map(|i| Draw { row: i % 2, seed: u64::from(i), ..draw }).collect();
        for (draw, token) in draws.iter().zip(tokens(&rows, &draws)) {
            let want = if draw.row == 0 { NO_TOKEN as f32 as usize } else { 33 };
            assert_eq!(token, want, "{draw:?}");
        }
    }
}

/// The id of the largest logit / T + Gumbel draw, the lowest of equals.
fn exhaustive(logits: &[f32], gumbels: &[f32], temperature: f32) -> usize {
    let mut best = (f32::NEG_INFINITY, NO_TOKEN as f32 as usize);
    for (id, (logit, gumbel)) in logits.iter().zip(gumbels).enumerate() {
        let score = logit / temperature + gumbel;
        if score > best.0 {
            best = (score, id);
        }
    }
    best.1
}

/// Rows that lead the search astray: flat, steep, masked, the largest logit at either end.
fn hard_rows(vocab: usize) -> Vec<Vec<f32>> {
    let mut numbers = Numbers::new(vocab as u64);
    let usual: Vec<f32> = numbers.list(vocab).iter().map(|v| v * 8.0).collect();
    let steep: Vec<f32> = numbers.list(vocab).iter().map(|v| v * 1e4).collect();
    let masked = |is_kept: fn(usize, usize) -> bool| -> Vec<f32> {
        let entries = usual.iter().enumerate();
        entries.map(|(id, &v)| if is_kept(id, vocab) { v } else { f32::NEG_INFINITY }).collect()
    };
    let (odd, only) = (masked(|id, _| id % 2 == 1), masked(|id, vocab| id == vocab / 2));
    let (mut first, mut last) = (usual.clone(), usual.clone());
    first[0] = 12.0;
    last[vocab - 1] = 12.0;
    vec![usual, steep, odd, only, first, last, vec![0.0; vocab], vec![-7.5; vocab]]
}

#[test]
fn the_pruned_search_finds_what_an_exhaustive_one_finds() {
    for (vocab, seeds) in [(1, 50), (2, 200), (15, 200), (16, 200), (17, 200), (49_152, 24)] {
        let rows = hard_rows(vocab);
        let (mut draws, mut want) = (Vec::new(), Vec::new());
        for seed in 0..seeds {
            // Seeds use all 64 bits.
            let (seed, index) = (seed * 0x0123_4567_89ab_cdef, seed as u32 % 5);
            let gumbels: Vec<f32> =
                (0..vocab as u32).map(|id| philox::gumbel(word(seed, id, index, 0))).collect();
            for temperature in [0.1, 0.7, 1.0, 3.0] {
                for (row, logits) in rows.iter().enumerate() {
                    draws.push(Draw { row: row as u32, seed, index, temperature, ..PLAIN });
                    want.push(exhaustive(logits, &gumbels, temperature));
                }
            }
        }
        let got = tokens(&rows, &draws);
        for ((got, want), draw) in got.iter().zip(&want).zip(&draws) {
            assert_eq!(got, want, "vocabulary {vocab}: {draw:?}");
        }
    }
}

/// Filters that keep everything leave the draw as it is, though another search makes it.
#[test]
fn filters_that_keep_everything_change_nothing() {
    let rows = [forty()];
    let plain: Vec<Draw> = (0..500).map(|seed| Draw { seed, ..PLAIN }).collect();
    let wide: Vec<Draw> = plain.iter().map(|draw| Draw { top_k: 40, ..*draw }).collect();
    let loose: Vec<Draw> = plain.iter().map(|draw| Draw { min_p: 1e-6, ..*draw }).collect();
    assert_eq!(tokens(&rows, &plain), tokens(&rows, &wide));
    assert_eq!(tokens(&rows, &plain), tokens(&rows, &loose));
}

#[test]
fn a_draw_does_not_depend_on_its_batch() {
    let rows = [forty(), forty().iter().map(|v| v * 0.5).collect()];
    let draws: Vec<Draw> = (0..64)
        .map(|i| Draw { row: i % 2, seed: u64::from(i / 4), index: i % 4, ..PLAIN })
        .collect();
    let batch = tokens(&rows, &draws);
    for (draw, want) in draws.iter().zip(&batch) {
        let row = rows[draw.row as usize].clone();
        assert_eq!(tokens(&[row], &[Draw { row: 0, ..*draw }]), [*want]);
    }
}

#[test]
fn extreme_words_never_overflow() {
    for word in (0..1000).chain(u32::MAX - 1000..=u32::MAX) {
        let (got, want) = (philox::gumbel(word), reference::sampling::gumbel(word));
        if want == f64::NEG_INFINITY {
            assert_eq!(got, f32::NEG_INFINITY, "word {word}");
        } else {
            // Two ulp of each of two logarithms, and the rounding of 1 − u.
            close(&format!("word {word}"), got, want, 4e-6 * want.abs().max(1.0));
        }
    }
}

/// Token 14 of this draw has a word whose u rounds to 1, where −ln(−ln u) would be +∞ and win.
#[test]
fn an_entry_whose_uniform_number_rounds_to_one_is_not_drawn() {
    let draw = Draw { seed: 1, index: 111_442, ..PLAIN };
    assert!(word(draw.seed, 14, draw.index, 0) >= u32::MAX - 127, "the draw is not extreme");
    let rows = [vec![0.0; 40]];
    let gumbels: Vec<f32> =
        (0..40).map(|id| philox::gumbel(word(draw.seed, id, draw.index, 0))).collect();
    let want = exhaustive(&rows[0], &gumbels, 1.0);
    assert_ne!(want, 14);
    let filtered = Draw { min_p: 1e-6, ..draw };
    assert_eq!(tokens(&rows, &[draw, filtered]), [want, want]);
}
