//! The formulas against published and hand-made values.

use super::*;

fn close(got: f64, want: f64, tolerance: f64) {
    assert!((got - want).abs() <= tolerance, "got {got}, want {want} ± {tolerance}");
}

/// k hits in n trials of n concepts.
fn singles(k: u64, n: u64) -> Vec<Count> {
    (0..n).map(|i| Count { k: u64::from(i < k), n: 1 }).collect()
}

#[test]
fn wilson_has_the_textbook_values() {
    let ten = rate(&singles(10, 50)).unwrap();
    close(ten.effective, 50.0, 0.0);
    close(ten.interval.low, 0.112, 5e-4);
    close(ten.interval.high, 0.330, 5e-4);
    let none = rate(&singles(0, 100)).unwrap();
    close(none.interval.low, 0.0, 0.0);
    close(none.interval.high, 0.037, 5e-4);
    close(rate(&singles(7, 7)).unwrap().interval.high, 1.0, 0.0);
    assert_eq!(rate(&[]), None);
    assert_eq!(rate(&[Count::default()]), None);
}

#[test]
fn clusters_shrink_the_effective_n() {
    // Whole concepts agree: ρ is 1 and n is the number of concepts.
    let agreeing: Vec<_> = (0..8).map(|i| Count { k: 10 * (i % 2), n: 10 }).collect();
    close(rate(&agreeing).unwrap().effective, 8.0, 1e-9);
    // No hits say nothing of ρ, so .1 is assumed: 80 / (1 + 9 · .1).
    let none = vec![Count { k: 0, n: 10 }; 8];
    close(rate(&none).unwrap().effective, 80.0 / 1.9, 1e-9);
    // Every concept has the same share: ρ is negative, the effective n is n.
    let even = vec![Count { k: 5, n: 10 }; 8];
    close(rate(&even).unwrap().effective, 80.0, 1e-9);
}

#[test]
fn mcnemar_is_the_exact_binomial() {
    let p = |first, second| Pairs { first, second, ..Pairs::default() }.mcnemar();
    close(p(12, 2), 2.0 * 106.0 / 16384.0, 1e-12);
    close(p(2, 12), p(12, 2), 0.0);
    close(p(0, 0), 1.0, 0.0);
    close(p(5, 5), 1.0, 0.0);
    close(p(0, 6), 2.0 / 64.0, 1e-12);
    assert!(p(3000, 2000) > 0.0, "no underflow to 0");
}

#[test]
fn paired_difference_is_newcombes() {
    // Newcombe 1998, table III: 36, 12, 2, 0 gives .0569 to .3404 by method 10.
    let pairs = Pairs { both: 36, first: 12, second: 2, neither: 0 };
    let arms = Arms {
        first: vec![Count { k: 48, n: 50 }],
        second: vec![Count { k: 38, n: 50 }],
        pairs: Some(pairs),
    };
    let plain = |k| rate(&singles(k, 50)).unwrap();
    let interval = newcombe(&plain(48), &plain(38), pairs.phi());
    close(interval.low, 0.0569, 1e-4);
    close(interval.high, 0.3404, 1e-4);
    // One cluster only: the same value, a wider interval, and it says how it was made.
    let one = differences(&[arms], 1)[0].unwrap();
    close(one.value, 0.2, 1e-12);
    assert_eq!(one.method, Method::Newcombe);
    assert!(one.interval.low < interval.low && one.interval.high > interval.high);
}

#[test]
fn bootstrap_resamples_concepts_and_repeats_itself() {
    let first: Vec<_> = (0..40).map(|i| Count { k: 2 * (i % 2), n: 4 }).collect();
    let second: Vec<_> = (0..40).map(|i| Count { k: i % 3, n: 4 }).collect();
    let arms = Arms { first, second, pairs: None };
    let none = Arms { second: vec![Count { k: 0, n: 4 }; 40], ..arms.clone() };
    let both = differences(&[arms.clone(), none.clone()], 7);
    assert_eq!(both, differences(&[arms.clone(), none], 7));
    let difference = both[0].unwrap();
    assert_eq!(difference.method, Method::ClusterBootstrap);
    // Standard error over 40 concepts of (0 or .5) − (0, .25 or .5): about .051.
    close(difference.interval.high - difference.interval.low, 2.0 * Z * 0.051, 0.03);
    assert!(difference.interval.low < difference.value);
    assert_eq!(both[1].unwrap().method, Method::Newcombe, "no false alarms at all");
    let few = Arms { first: vec![Count { k: 1, n: 4 }; 19], ..arms };
    assert_eq!(differences(&[few], 7)[0].unwrap().method, Method::Newcombe);
}

#[test]
fn equal_rates_of_unequal_arms_give_no_detection() {
    let (h, f) = corrected(Count { k: 0, n: 8 }, Count { k: 0, n: 400 });
    close(probit(h) - probit(f), 0.0, 1e-12);
    let (h, f) = corrected(Count { k: 3, n: 10 }, Count { k: 0, n: 10 });
    close(h, 3.5 / 11.0, 1e-12);
    close(f, 0.5 / 11.0, 1e-12);
    let rate_of = |k, n| rate(&singles(k, n)).unwrap();
    assert_eq!(detection(&rate_of(0, 8), &rate_of(0, 400)), None, "below 20 trials");
    let found = detection(&rate_of(84, 100), &rate_of(16, 100)).unwrap();
    close(found.d_prime, 1.955, 0.01);
    close(found.criterion, 0.0, 1e-9);
    assert!(found.interval.low > 1.4 && found.interval.high < 2.5);
}

#[test]
fn probit_inverts_the_normal() {
    close(probit(0.5), 0.0, 0.0);
    close(probit(0.975), Z, 1e-6);
    close(probit(0.2), -0.841_621_2, 1e-6);
    close(probit(1e-12), -7.034_484, 1e-5);
}

#[test]
fn auroc_counts_ties_as_half() {
    let values = vec![(1.0, 0, false), (2.0, 1, false), (2.0, 0, true), (3.0, 1, true)];
    let ranking = Ranking::new(values);
    close(ranking.auroc(&[1, 1]).unwrap(), 3.5 / 4.0, 1e-12);
    close(ranking.auroc(&[2, 0]).unwrap(), 1.0, 1e-12);
    assert_eq!(Ranking::new(vec![(1.0, 0, true)]).auroc(&[1]), None);
}

#[test]
fn quantiles_interpolate() {
    let values = [1.0, 2.0, 4.0];
    close(quantile(&values, 0.5).unwrap(), 2.0, 0.0);
    close(quantile(&values, 0.75).unwrap(), 3.0, 1e-12);
    close(quantile(&values, 1.0).unwrap(), 4.0, 0.0);
    assert_eq!(quantile(&[], 0.5), None);
}

#[test]
fn smallest_effect_has_the_textbook_sample_size() {
    // 10 % against 20 % takes 199 trials an arm.
    close(smallest_effect(0.1, 199.0, 199.0).unwrap(), 0.1, 1.5e-3);
    assert_eq!(smallest_effect(0.1, 1.0, 1.0), None);
}

#[test]
fn a_rate_is_corrected_for_the_judges_errors() {
    let count = |k, n| Count { k, n };
    let of = |apparent, found, spared| rogan_gladen(apparent, found, spared);
    let got = of(count(90, 300), count(40, 50), count(90, 100)).unwrap();
    close(got.share, (0.3 + 0.9 - 1.0) / (0.8 + 0.9 - 1.0), 1e-12);
    assert!(got.interval.low < got.share && got.share < got.interval.high);
    // Fewer yes than the false alarms alone would give: none.
    assert_eq!(of(count(1, 300), count(40, 50), count(90, 100)).unwrap().share, 0.0);
    assert_eq!(of(count(9, 30), count(1, 2), count(1, 2)), None, "no better than chance");
    // One reply found of one says too little to make up for 90 false alarms of 100.
    assert_eq!(of(count(90, 100), count(1, 1), count(10, 100)), None);
    assert_eq!(of(count(9, 30), count(0, 0), count(9, 10)), None, "nothing to learn Se from");
    // A judge that is known well and never errs leaves the interval of the rate itself.
    let sure = of(count(10, 50), count(100_000, 100_000), count(100_000, 100_000)).unwrap();
    close(sure.interval.low, 0.112, 0.01);
    close(sure.interval.high, 0.330, 0.01);
}

#[test]
fn corrected_intervals_cover_the_truth() {
    let mut state = 7;
    let mut draw = |n: u64, p: f64| {
        let hit = |state: &mut u64| (split_mix(state) >> 11) as f64 / (1_u64 << 53) as f64 <= p;
        Count { k: (0..n).filter(|_| hit(&mut state)).count() as u64, n }
    };
    for (truth, se, sp) in [(0.1, 0.8, 0.95), (0.5, 0.7, 0.8), (0.02, 0.9, 0.9)] {
        let mut covered = 0;
        for _ in 0..1000 {
            let apparent = draw(300, truth * se + (1.0 - truth) * (1.0 - sp));
            let (found, spared) = (draw(50, se), draw(100, sp));
            let interval = rogan_gladen(apparent, found, spared).unwrap().interval;
            covered += u32::from(interval.low <= truth && truth <= interval.high);
        }
        assert!(covered >= 930, "{covered} of 1000 at {truth}, {se}, {sp}");
    }
}

#[test]
fn sensitivity_is_counted_above_all_but_the_allowed_false_alarms() {
    let negatives = (0..300).map(|i| (f64::from(i), 0, false));
    let positives = [10.0, 296.0, 297.0, 298.5, 400.0].map(|value| (value, 0, true));
    let ranking = Ranking::new(negatives.clone().chain(positives).collect());
    // Three of 300 may exceed the threshold: it is the fourth largest, 296.
    assert_eq!(ranking.sensitivity(0.01), Some(3.0 / 5.0));
    assert_eq!(ranking.sensitivity(0.0), Some(1.0 / 5.0));
    let few = Ranking::new(negatives.skip(1).chain(positives).collect());
    assert_eq!(few.sensitivity(0.01), None, "299 negatives");
}
