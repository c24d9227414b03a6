//! The quantities and names the pool works with, as types instead of bare numbers and strings.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Sub};
use std::str::FromStr;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A number of bytes. Shown in decimal units: 1 GB is 1,000,000,000 bytes, as disks and model files count. Sums stop at
/// the largest number, which no budget holds.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl Bytes {
    /// No bytes.
    pub const ZERO: Self = Self(0);

    /// `gb` × 10⁹ bytes, rounded; negative and non-finite values give zero.
    #[must_use]
    pub fn from_gb(gb: f64) -> Self {
        // `as` saturates and maps NaN to 0.
        Self((gb * 1e9).round() as u64)
    }

    /// This quantity in GB (10⁹ bytes).
    #[must_use]
    pub fn as_gb(self) -> f64 {
        self.0 as f64 / 1e9
    }

    /// `self - other`, or zero where `other` is larger.
    #[must_use]
    pub fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

/// A host's key. It is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(String);

impl ApiKey {
    /// A key that was read from where it is kept.
    #[must_use]
    pub const fn new(key: String) -> Self {
        Self(key)
    }

    /// The key itself, for the request that needs it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(hidden)")
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = self.0 as f64;
        let text = match self.0 {
            0..1_000 => format!("{} B", self.0),
            1_000..1_000_000 => format!("{:.1} kB", n / 1e3),
            1_000_000..1_000_000_000 => format!("{:.1} MB", n / 1e6),
            _ => format!("{:.2} GB", n / 1e9),
        };
        f.pad(&text)
    }
}

impl Add for Bytes {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl AddAssign for Bytes {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sub for Bytes {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self(self.0 - other.0)
    }
}

impl Sum for Bytes {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self::ZERO, Add::add)
    }
}

/// A name was empty or held a character outside `A-Z a-z 0-9 . _ : / -`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{given:?} is not a name: use letters, digits and . _ - : /")]
pub struct BadName {
    /// What was given.
    pub given: String,
}

macro_rules! name {
    ($(#[$doc:meta])* $type:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
        #[serde(try_from = "String", into = "String")]
        #[schemars(with = "String")]
        pub struct $type(Box<str>);

        impl $type {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $type {
            type Err = BadName;
            fn from_str(name: &str) -> Result<Self, BadName> {
                let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | ':' | '/');
                if name.is_empty() || !name.chars().all(good) {
                    return Err(BadName { given: name.to_owned() });
                }
                Ok(Self(name.into()))
            }
        }

        impl TryFrom<String> for $type {
            type Error = BadName;
            fn try_from(name: String) -> Result<Self, BadName> {
                name.parse()
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> Self {
                name.0.into()
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}

name! {
    /// The name of a logical model, as the configuration's `models:` has it.
    ModelName
}
name! {
    /// The name of a remote host, as the configuration's `hosts:` has it.
    HostName
}
name! {
    /// The name of a pipeline, as the configuration's `pipelines:` has it.
    PipelineName
}
name! {
    /// The id of one step of a pipeline.
    StepId
}

/// A moment, as the time since some fixed start. The deciding parts of the pool get it with every event and never
/// read a clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp(Duration);

impl Timestamp {
    /// The moment `since_start` after the start.
    #[must_use]
    pub const fn new(since_start: Duration) -> Self {
        Self(since_start)
    }

    /// The time since the start.
    #[must_use]
    pub const fn since_start(self) -> Duration {
        self.0
    }

    /// The time from `earlier` to this moment; zero if `earlier` is later.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl Add<Duration> for Timestamp {
    type Output = Self;
    fn add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(duration))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_shown_in_decimal_units() {
        let shown = [999, 1_000, 2_500_000, 6_460_000_000].map(|n| Bytes(n).to_string());
        assert_eq!(shown, ["999 B", "1.0 kB", "2.5 MB", "6.46 GB"]);
        assert_eq!(Bytes::from_gb(0.5), Bytes(500_000_000));
        assert_eq!(Bytes::from_gb(-1.0), Bytes::ZERO);
        assert_eq!(Bytes::from_gb(f64::NAN), Bytes::ZERO);
    }

    #[test]
    fn names_refuse_spaces_and_nothing() {
        assert!("solar:10.7b".parse::<ModelName>().is_ok());
        assert!("".parse::<ModelName>().is_err());
        assert!("a b".parse::<ModelName>().is_err());
    }
}
