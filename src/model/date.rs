//! The pinned date of templates that print today's.

use crate::error::{Error, Result};

/// A day of the Gregorian calendar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Date {
    year: u32,
    /// 1..=12.
    month: u32,
    /// 1..=31.
    day: u32,
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
/// From 1 January of year 0 (proleptic), which was a Saturday.
const WEEKDAYS: [&str; 7] =
    ["Saturday", "Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday"];

impl Date {
    /// Reads `YYYY-MM-DD`.
    pub fn parse(text: &str) -> Result<Self> {
        let digits = |part: &str, n: usize| {
            (part.len() == n && part.bytes().all(|b| b.is_ascii_digit()))
                .then(|| part.parse().ok())?
        };
        let parts: Vec<&str> = text.split('-').collect();
        let date = match parts[..] {
            [year, month, day] => match (digits(year, 4), digits(month, 2), digits(day, 2)) {
                (Some(year), Some(month), Some(day)) => Some(Self { year, month, day }),
                _ => None,
            },
            _ => None,
        };
        date.filter(|date| (1..=12).contains(&date.month))
            .filter(|date| (1..=days_in(date.year, date.month)).contains(&date.day))
            .ok_or_else(|| {
                Error::new("not a date").at("date").expected("YYYY-MM-DD").got(format!("{text:?}"))
            })
    }

    /// As C's `strftime` in English, for the parts that a day has.
    ///
    /// # Errors
    ///
    /// Names a conversion that is not known.
    pub fn format(self, format: &str) -> std::result::Result<String, String> {
        let mut out = String::new();
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let mut conversion: String = chars.next().into_iter().collect();
            if conversion == "-" {
                conversion.extend(chars.next());
            }
            out.push_str(&self.part(&conversion)?);
        }
        Ok(out)
    }

    fn part(self, conversion: &str) -> std::result::Result<String, String> {
        let month = MONTHS[self.month as usize - 1];
        Ok(match conversion {
            "Y" => format!("{:04}", self.year),
            "y" => format!("{:02}", self.year % 100),
            "m" => format!("{:02}", self.month),
            "-m" => self.month.to_string(),
            "d" => format!("{:02}", self.day),
            "-d" => self.day.to_string(),
            "e" => format!("{:2}", self.day),
            "B" => month.to_owned(),
            "b" => month[..3].to_owned(),
            "A" => self.weekday().to_owned(),
            "a" => self.weekday()[..3].to_owned(),
            "F" => format!("{:04}-{:02}-{:02}", self.year, self.month, self.day),
            "%" => "%".to_owned(),
            other => return Err(format!("strftime_now: a pinned date has no `%{other}`")),
        })
    }

    fn weekday(self) -> &'static str {
        let years = (0..self.year).map(|year| if is_leap(year) { 366 } else { 365 });
        let months = (1..self.month).map(|month| days_in(self.year, month));
        let days: u32 = years.chain(months).sum::<u32>() + self.day - 1;
        WEEKDAYS[days as usize % 7]
    }
}

fn is_leap(year: u32) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn days_in(year: u32, month: u32) -> u32 {
    match month {
        2 => 28 + u32::from(is_leap(year)),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_a_day() {
        let date = Date::parse("2025-01-05").unwrap();
        let cases = [
            ("%d %b %Y", "05 Jan 2025"),
            ("%B %-d, %Y (%A)", "January 5, 2025 (Sunday)"),
            ("%a %e/%-m/%y %F 100%%", "Sun  5/1/25 2025-01-05 100%"),
        ];
        for (format, want) in cases {
            assert_eq!(date.format(format).unwrap(), want);
        }
        assert!(date.format("%H:%M").unwrap_err().contains("%H"));
        // Days whose weekday is on record.
        assert_eq!(Date::parse("1969-07-20").unwrap().format("%A").unwrap(), "Sunday");
        assert_eq!(Date::parse("2000-02-29").unwrap().format("%A").unwrap(), "Tuesday");
    }

    #[test]
    fn refuses_days_that_are_none() {
        for text in
            ["2025-02-29", "2025-13-01", "2025-00-10", "2025-1-1", "today", "", "2025-01-00"]
        {
            assert!(Date::parse(text).is_err(), "{text}");
        }
    }
}
