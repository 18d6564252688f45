//! Rates, intervals and comparisons: pure functions. All intervals are at 95 %.
//!
//! Trials of one concept are not independent (they share a vector and seeds), so a *cluster* here
//! is a concept, and a rate over many trials of few concepts counts as fewer trials than it has.

#[cfg(test)]
mod tests;

use serde::Serialize;

/// z of a two-sided 95 % interval.
const Z: f64 = 1.959_963_984_540_054;
/// z of a power of 80 %.
const Z_POWER: f64 = 0.841_621_233_572_914;
/// Correlation within a cluster where the data cannot tell: no or only hits, or one cluster.
pub const ASSUMED_CORRELATION: f64 = 0.1;
/// With fewer clusters than this the bootstrap's intervals are too narrow to be used.
pub const MIN_CLUSTERS: usize = 20;
/// Fewer trials an arm than this say nothing about d′.
pub const MIN_DETECTION: u64 = 20;
/// Fewer negatives than this say nothing about one false alarm in a hundred.
pub const MIN_NEGATIVES: usize = 300;
const RESAMPLES: usize = 2000;

/// k of n.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Count {
    /// Hits.
    pub k: u64,
    /// Trials.
    pub n: u64,
}

impl Count {
    /// Counts one more trial.
    pub fn add(&mut self, hit: bool) {
        self.k += u64::from(hit);
        self.n += 1;
    }

    /// k / n; `None` without trials.
    pub fn share(self) -> Option<f64> {
        (self.n > 0).then(|| self.k as f64 / self.n as f64)
    }

    /// Whether nothing or everything is a hit, so that resampling shows no spread.
    fn is_extreme(self) -> bool {
        self.k == 0 || self.k == self.n
    }
}

impl std::iter::Sum for Count {
    fn sum<I: Iterator<Item = Self>>(counts: I) -> Self {
        counts.fold(Self::default(), |a, b| Self { k: a.k + b.k, n: a.n + b.n })
    }
}

/// A 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Interval {
    /// Its lower end.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
}

/// A rate with the interval that its clusters allow.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Rate {
    /// Hits and trials.
    pub count: Count,
    /// k / n.
    pub share: f64,
    /// n / (1 + (m − 1) ρ): how many independent trials the n are worth.
    pub effective: f64,
    /// Wilson, with the effective n.
    pub interval: Interval,
}

/// Wilson's score interval of the share `p` among `n` trials (Wilson 1927; Brown and others
/// 2001, eq. 4). `n` > 0 need not be whole.
pub fn wilson(p: f64, n: f64) -> Interval {
    let z2 = Z * Z / n;
    let middle = (p + z2 / 2.0) / (1.0 + z2);
    let half = Z / (1.0 + z2) * (p * (1.0 - p) / n + z2 / (4.0 * n)).sqrt();
    // At p = 0 and p = 1 the ends are 0 and 1 but for rounding.
    let low = if p <= 0.0 { 0.0 } else { (middle - half).max(0.0) };
    let high = if p >= 1.0 { 1.0 } else { (middle + half).min(1.0) };
    Interval { low, high }
}

/// The rate over all clusters, with Wilson's interval at the effective n (Kish 1965: m is the mean
/// cluster size weighted by itself). `None` without trials.
pub fn rate(clusters: &[Count]) -> Option<Rate> {
    let count: Count = clusters.iter().copied().sum();
    let share = count.share()?;
    let n = count.n as f64;
    let size = clusters.iter().map(|c| (c.n * c.n) as f64).sum::<f64>() / n;
    let estimate = if count.is_extreme() { None } else { correlation(clusters) };
    let rho = estimate.unwrap_or(ASSUMED_CORRELATION).clamp(0.0, 1.0);
    let effective = n / (1.0 + (size - 1.0) * rho);
    Some(Rate { count, share, effective, interval: wilson(share, effective) })
}

/// Intraclass correlation of a binary outcome by analysis of variance (Ridout, Demétrio and Firth
/// 1999). `None` with fewer than two clusters, one trial in each, or no variance.
fn correlation(clusters: &[Count]) -> Option<f64> {
    let filled: Vec<_> = clusters.iter().filter(|c| c.n > 0).collect();
    let (k, total) = (filled.len() as f64, filled.iter().map(|c| c.n as f64).sum::<f64>());
    if k < 2.0 || total <= k {
        return None;
    }
    let hits = filled.iter().map(|c| c.k as f64).sum::<f64>();
    let squares = filled.iter().map(|c| (c.k * c.k) as f64 / c.n as f64).sum::<f64>();
    let sizes = filled.iter().map(|c| (c.n * c.n) as f64).sum::<f64>();
    let between = (squares - hits * hits / total) / (k - 1.0);
    let within = (hits - squares) / (total - k);
    let size = (total - sizes / total) / (k - 1.0);
    let spread = between + (size - 1.0) * within;
    (spread > 0.0).then(|| (between - within) / spread)
}

/// Pairs of answers, counted by what both say: trials of one seed under two conditions, or verdicts of
/// two judges on one trial, of whom the second is taken at its word where shares are called precision,
/// recall and specificity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Pairs {
    /// Yes in both.
    pub both: u64,
    /// Yes only in the first.
    pub first: u64,
    /// Yes only in the second.
    pub second: u64,
    /// No in both.
    pub neither: u64,
}

impl Pairs {
    /// Counts one more pair.
    pub fn add(&mut self, first: bool, second: bool) {
        *match (first, second) {
            (true, true) => &mut self.both,
            (true, false) => &mut self.first,
            (false, true) => &mut self.second,
            (false, false) => &mut self.neither,
        } += 1;
    }

    /// All pairs.
    pub fn total(self) -> u64 {
        self.both + self.first + self.second + self.neither
    }

    /// Share of equal verdicts; none without pairs.
    pub fn accuracy(self) -> Option<f64> {
        Count { k: self.both + self.neither, n: self.total() }.share()
    }

    /// Share of the first's yes that the second shares; none where the first never says yes.
    pub fn precision(self) -> Option<f64> {
        Count { k: self.both, n: self.both + self.first }.share()
    }

    /// Share of the second's yes that the first finds; none where the second never says yes.
    pub fn recall(self) -> Option<f64> {
        Count { k: self.both, n: self.both + self.second }.share()
    }

    /// Share of the second's no that the first shares; none where the second always says yes.
    pub fn specificity(self) -> Option<f64> {
        Count { k: self.neither, n: self.neither + self.first }.share()
    }

    /// Cohen's kappa, (agreement − chance)/(1 − chance) with chance from both sides' own rates;
    /// none where both always say the same one thing.
    pub fn kappa(self) -> Option<f64> {
        let total = self.total() as f64;
        let yes = |alone: u64| (self.both + alone) as f64 / total;
        let (first, second) = (yes(self.first), yes(self.second));
        let chance = first * second + (1.0 - first) * (1.0 - second);
        let kappa = (self.accuracy()? - chance) / (1.0 - chance);
        kappa.is_finite().then_some(kappa)
    }

    /// Gwet's AC1 (Gwet 2008), the same with chance 2π(1 − π), π the mean of both sides' rates: it
    /// does not collapse where one answer is rare, as kappa does. None without pairs.
    pub fn ac1(self) -> Option<f64> {
        let yes = 2 * self.both + self.first + self.second;
        let share = Count { k: yes, n: 2 * self.total() }.share()?;
        let chance = 2.0 * share * (1.0 - share);
        Some((self.accuracy()? - chance) / (1.0 - chance))
    }

    /// The exact two-sided p of paired shares: the binomial tail of the discordant pairs at ½.
    pub fn mcnemar(self) -> f64 {
        let n = self.first + self.second;
        let mut log_term = -(n as f64) * std::f64::consts::LN_2;
        let mut tail = 0.0;
        for i in 0..=self.first.min(self.second) {
            tail += log_term.exp();
            log_term += ((n - i) as f64 / (i + 1) as f64).ln();
        }
        (2.0 * tail).min(1.0)
    }

    /// Newcombe's φ̂: the correlation of the two answers, its numerator corrected for continuity.
    fn phi(self) -> f64 {
        let [a, b, c, d] = [self.both, self.first, self.second, self.neither].map(|x| x as f64);
        let margins = (a + b) * (c + d) * (a + c) * (b + d);
        let mut top = a * d - b * c;
        if top > 0.0 {
            top = (top - (a + b + c + d) / 2.0).max(0.0);
        }
        if margins > 0.0 { top / margins.sqrt() } else { 0.0 }
    }
}

/// Interval of a − b from the two rates' own intervals: Newcombe 1998, method 10 (paired, with its
/// φ̂); with φ 0 his method for independent rates.
fn newcombe(a: &Rate, b: &Rate, phi: f64) -> Interval {
    let side = |x: f64, y: f64| (x * x - 2.0 * phi * x * y + y * y).max(0.0).sqrt();
    let value = a.share - b.share;
    let down = side(a.share - a.interval.low, b.interval.high - b.share);
    let up = side(a.interval.high - a.share, b.share - b.interval.low);
    Interval { low: value - down, high: value + up }
}

/// Two arms of a comparison, by cluster.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Arms {
    /// Hits of the first arm, one count a cluster.
    pub first: Vec<Count>,
    /// Hits of the second arm, clusters in the same order.
    pub second: Vec<Count>,
    /// The same trials as pairs, where they are paired.
    pub pairs: Option<Pairs>,
}

/// How an interval of a difference was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Concepts resampled, all their trials with them.
    ClusterBootstrap,
    /// Newcombe's, from Wilson intervals with the effective n.
    Newcombe,
}

/// The difference of two rates.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// First minus second.
    pub value: f64,
    /// Its interval.
    pub interval: Interval,
    /// How the interval was made.
    pub method: Method,
}

/// Differences of all comparisons, every one from the same resamples of the clusters. Where the
/// bootstrap is no use (fewer than [`MIN_CLUSTERS`] clusters, an arm with no or only hits) the
/// interval is Newcombe's. `None` where an arm has no trials.
pub fn differences(comparisons: &[Arms], seed: u64) -> Vec<Option<Difference>> {
    let filled = |a: &&Arms| a.first.iter().zip(&a.second).filter(|(f, s)| f.n + s.n > 0).count();
    let clusters = comparisons.iter().map(|a| a.first.len()).max().unwrap_or(0);
    let intervals = bootstrap(clusters, comparisons.len(), seed, |weights| {
        let share = |arm| weighted(arm, weights).share();
        comparisons.iter().map(|a| Some(share(&a.first)? - share(&a.second)?)).collect()
    });
    comparisons
        .iter()
        .zip(intervals)
        .map(|(arms, interval)| {
            let (first, second) = (rate(&arms.first)?, rate(&arms.second)?);
            let value = first.share - second.share;
            let useful = filled(&arms) >= MIN_CLUSTERS
                && !first.count.is_extreme()
                && !second.count.is_extreme();
            if let (true, Some(interval)) = (useful, interval) {
                return Some(Difference { value, interval, method: Method::ClusterBootstrap });
            }
            let interval = newcombe(&first, &second, arms.pairs.map_or(0.0, Pairs::phi));
            Some(Difference { value, interval, method: Method::Newcombe })
        })
        .collect()
}

/// First minus second, of rates that are not paired, with Newcombe's interval at their effective n.
pub fn difference(first: &Rate, second: &Rate) -> (f64, Interval) {
    (first.share - second.share, newcombe(first, second, 0.0))
}

fn weighted(arm: &[Count], weights: &[u32]) -> Count {
    arm.iter()
        .zip(weights)
        .map(|(c, &w)| Count { k: c.k * u64::from(w), n: c.n * u64::from(w) })
        .sum()
}

/// Percentile bootstrap over clusters: `statistics` gets how often each cluster was drawn and
/// returns `width` values. `None` with fewer than [`MIN_CLUSTERS`] clusters, and for a statistic
/// that is undefined in more than one resample of twenty. The same seed gives the same intervals.
pub fn bootstrap(
    clusters: usize,
    width: usize,
    seed: u64,
    mut statistics: impl FnMut(&[u32]) -> Vec<Option<f64>>,
) -> Vec<Option<Interval>> {
    if clusters < MIN_CLUSTERS {
        return vec![None; width];
    }
    let mut state = seed;
    let mut drawn: Vec<Vec<f64>> = vec![Vec::with_capacity(RESAMPLES); width];
    let mut weights = vec![0; clusters];
    for _ in 0..RESAMPLES {
        weights.fill(0);
        for _ in 0..clusters {
            let pick = (u128::from(split_mix(&mut state)) * clusters as u128) >> 64;
            weights[pick as usize] += 1;
        }
        for (values, value) in drawn.iter_mut().zip(statistics(&weights)) {
            values.extend(value);
        }
    }
    drawn
        .into_iter()
        .map(|mut values| {
            if values.len() * 20 < RESAMPLES * 19 {
                return None;
            }
            values.sort_by(f64::total_cmp);
            Some(Interval { low: quantile(&values, 0.025)?, high: quantile(&values, 0.975)? })
        })
        .collect()
}

/// `SplitMix64` (Steele, Lea and Flood 2014).
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut x = *state;
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// The quantile `q` (0..=1) of ascending values, interpolated (type 7 of Hyndman and Fan 1996).
/// `None` of no values.
pub fn quantile(sorted: &[f64], q: f64) -> Option<f64> {
    let at = q * sorted.len().checked_sub(1)? as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    // Equal ends are returned as they are: infinities have no difference.
    Some(if low == high { low } else { low + (high - low) * at.fract() })
}

/// Signal detection: how far apart hits and false alarms lie in units of the noise.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Detection {
    /// d′ = z(H) − z(F).
    pub d_prime: f64,
    /// c = −(z(H) + z(F)) / 2; positive: says yes seldom.
    pub criterion: f64,
    /// Of d′.
    pub interval: Interval,
}

/// d′ and criterion (Macmillan and Creelman 2005) with the interval of Gourevitch and Galanter
/// 1967 at the effective n. `None` below [`MIN_DETECTION`] trials an arm.
pub fn detection(hits: &Rate, alarms: &Rate) -> Option<Detection> {
    if hits.count.n.min(alarms.count.n) < MIN_DETECTION {
        return None;
    }
    let (h, f) = corrected(hits.count, alarms.count);
    let (zh, zf) = (probit(h), probit(f));
    let variance = |p: f64, z: f64, n: f64| {
        let density = (-z * z / 2.0).exp() / std::f64::consts::TAU.sqrt();
        p * (1.0 - p) / (n * density * density)
    };
    let half = Z * (variance(h, zh, hits.effective) + variance(f, zf, alarms.effective)).sqrt();
    let d_prime = zh - zf;
    let interval = Interval { low: d_prime - half, high: d_prime + half };
    Some(Detection { d_prime, criterion: -(zh + zf) / 2.0, interval })
}

/// Shares kept off 0 and 1: (k + n/N) / (n + 2n/N), N of both arms together. Adding to each arm in
/// proportion to its size keeps equal rates equal; the usual (k + ½) / (n + 1) does so only at
/// equal n, and makes d′ 1.43 out of 0 of 8 against 0 of 400.
fn corrected(hits: Count, alarms: Count) -> (f64, f64) {
    let total = (hits.n + alarms.n) as f64;
    let share = |c: Count| {
        let n = c.n as f64;
        (c.k as f64 + n / total) / (n + 2.0 * n / total)
    };
    (share(hits), share(alarms))
}

/// The normal quantile of 0 < p < 1 (Wichura 1988, AS 241, `PPND7`: 7 digits).
fn probit(p: f64) -> f64 {
    let q = p - 0.5;
    if q.abs() <= 0.425 {
        let r = 0.180_625 - q * q;
        let top =
            ((59.109_374_720 * r + 159.291_132_02) * r + 50.434_271_938) * r + 3.387_132_717_9;
        let bottom = ((67.187_563_600 * r + 78.757_757_664) * r + 17.895_169_469) * r + 1.0;
        return q * top / bottom;
    }
    let r = (-p.min(1.0 - p).ln()).sqrt();
    let tail = if r <= 5.0 {
        let r = r - 1.6;
        let top =
            ((0.170_238_211_03 * r + 1.306_728_481_6) * r + 2.756_815_390_0) * r + 1.423_437_277_7;
        top / ((0.120_211_329_75 * r + 0.737_001_642_50) * r + 1.0)
    } else {
        let r = r - 5.0;
        let top = ((0.017_337_203_997 * r + 0.428_682_943_37) * r + 3.081_226_386_0) * r
            + 6.657_905_115_0;
        top / ((0.012_258_202_635 * r + 0.241_978_942_25) * r + 1.0)
    };
    tail.copysign(q)
}

/// Values of two arms, ready for the area under the ROC curve.
#[derive(Clone, Debug)]
pub struct Ranking {
    /// (value, cluster, whether of the first arm), ascending.
    sorted: Vec<(f64, usize, bool)>,
}

impl Ranking {
    /// From (value, cluster, whether of the first arm).
    pub fn new(mut values: Vec<(f64, usize, bool)>) -> Self {
        values.sort_by(|a, b| a.0.total_cmp(&b.0));
        Self { sorted: values }
    }

    /// How often a value of the first arm exceeds one of the second, ties counting half (Mann and
    /// Whitney's statistic over the number of pairs), each value as often as its cluster's weight.
    /// `None` where an arm is empty.
    pub fn auroc(&self, weights: &[u32]) -> Option<f64> {
        let (mut below, mut firsts, mut wins) = (0.0, 0.0, 0.0);
        for ties in self.sorted.chunk_by(|a, b| a.0 == b.0) {
            let weight = |arm: bool| {
                let of_arm = ties.iter().filter(|v| v.2 == arm);
                of_arm.map(|v| f64::from(weights[v.1])).sum::<f64>()
            };
            let (first, second) = (weight(true), weight(false));
            wins += first * (below + second / 2.0);
            below += second;
            firsts += first;
        }
        (firsts > 0.0 && below > 0.0).then(|| wins / (firsts * below))
    }

    /// The share of the first arm above a threshold that at most this share of the second exceeds, the lowest
    /// such threshold among the second's values. `None` below [`MIN_NEGATIVES`] of the second.
    pub fn sensitivity(&self, false_alarms: f64) -> Option<f64> {
        let of_arm = |arm: bool| self.sorted.iter().filter(move |value| value.2 == arm);
        let (firsts, seconds) = (of_arm(true).count(), of_arm(false).count());
        if seconds < MIN_NEGATIVES || firsts == 0 {
            return None;
        }
        let allowed = (false_alarms * seconds as f64).floor() as usize;
        let threshold = of_arm(false).rev().nth(allowed)?.0;
        Some(of_arm(true).filter(|value| value.0 > threshold).count() as f64 / firsts as f64)
    }
}

/// The smallest excess over a false-alarm rate that arms of these (effective) sizes find with a
/// power of 80 % in a two-sided test at 5 % (Fleiss, Levin and Paik 2003, eq. 4.14), to 0.1
/// percentage points. `None` where not even hits in every trial would be enough.
pub fn smallest_effect(alarms: f64, hits_n: f64, alarms_n: f64) -> Option<f64> {
    let found = |h: f64| {
        let pooled = (h * hits_n + alarms * alarms_n) / (hits_n + alarms_n);
        let null = (pooled * (1.0 - pooled) * (1.0 / hits_n + 1.0 / alarms_n)).sqrt();
        let spread = h * (1.0 - h) / hits_n + alarms * (1.0 - alarms) / alarms_n;
        h - alarms >= Z * null + Z_POWER * spread.sqrt()
    };
    (1..=1000).map(|step| f64::from(step) / 1000.0).find(|e| alarms + e <= 1.0 && found(alarms + e))
}

/// A rate corrected for a judge's errors.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Corrected {
    /// (p + Sp − 1) / (Se + Sp − 1), kept in 0..=1.
    pub share: f64,
    /// Its interval.
    pub interval: Interval,
}

/// The true rate behind a judge's (Rogan and Gladen 1978), from its yes of all trials, its yes of those
/// that are yes (Se) and its no of those that are no (Sp); the interval is that of Lang and Reiczigel 2014,
/// which adds pseudo-counts and takes the errors of all three into account. `None` where one of them has
/// no trials, or the judge is no better than chance (Se + Sp ≤ 1, with or without the pseudo-counts).
pub fn rogan_gladen(apparent: Count, found: Count, spared: Count) -> Option<Corrected> {
    let (p, se, sp) = (apparent.share()?, found.share()?, spared.share()?);
    if se + sp <= 1.0 {
        return None;
    }
    let z2 = Z * Z;
    // Counts with `more` pseudo-trials, half of them hits.
    let padded = |c: Count, more: f64| {
        let n = c.n as f64 + more;
        ((c.k as f64 + more / 2.0) / n, n)
    };
    let ((p_z, n), (se_1, n_se), (sp_1, n_sp)) =
        (padded(apparent, z2), padded(found, 2.0), padded(spared, 2.0));
    let youden = se_1 + sp_1 - 1.0;
    if youden <= 0.0 {
        return None;
    }
    let share = (p_z + sp_1 - 1.0) / youden;
    let (v_se, v_sp) = (se_1 * (1.0 - se_1) / n_se, sp_1 * (1.0 - sp_1) / n_sp);
    let shift = 2.0 * z2 * (share * v_se - (1.0 - share) * v_sp);
    let spread = p_z * (1.0 - p_z) / n + share * share * v_se + (1.0 - share).powi(2) * v_sp;
    let half = Z * spread.sqrt() / youden;
    let within = |x: f64| x.clamp(0.0, 1.0);
    Some(Corrected {
        share: within((p + sp - 1.0) / (se + sp - 1.0)),
        interval: Interval {
            low: within(share + shift - half),
            high: within(share + shift + half),
        },
    })
}
