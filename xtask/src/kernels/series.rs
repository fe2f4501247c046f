//! Which kernels there are: of each series (6.1, 6.12, …) the newest.

use std::{collections::BTreeMap, fmt};

use anyhow::{Context as _, Result};

use super::archive::Archive;

/// The oldest series that is tried: the floor of what sheave promises.
const FLOOR: Series = Series(6, 1);
/// The flavour with every driver: the others lack some, or are for special uses.
const FLAVOUR: &str = "amd64";

/// The first two numbers of a kernel's version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Series(u32, u32);

impl Series {
    /// Reads `6.12`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.split_once('.')?;
        Some(Self(major.parse().ok()?, minor.parse().ok()?))
    }

    /// Has the program a duty to load there?
    pub(super) fn is_supported(self) -> bool {
        self >= FLOOR
    }
}

impl fmt::Display for Series {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(&format!("{}.{}", self.0, self.1))
    }
}

/// A kernel that can be downloaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stock {
    pub(super) series: Series,
    /// What `uname -r` says: `6.12.113+deb13-amd64`.
    pub(super) release: String,
    /// The package's version.
    pub(super) version: String,
    /// The packages that hold its image and its modules.
    pub(super) packages: Vec<String>,
    /// The archive has its modules. Of a backport that another has followed it may not, though it has the image.
    pub(super) has_modules: bool,
}

/// The newest kernel of every series that the archive has, oldest series first.
///
/// # Errors
///
/// The archive does not answer.
pub(super) fn newest_of_each(archive: &Archive) -> Result<Vec<Stock>> {
    let releases = newest_releases(&archive.names("linux-image-")?);
    releases.into_iter().map(|(series, release)| describe(archive, series, release)).collect()
}

fn describe(archive: &Archive, series: Series, release: String) -> Result<Stock> {
    let image = format!("linux-image-{release}");
    let fields = archive.show(&image)?;
    let version = fields.get("Version").with_context(|| format!("{image} has no version"))?.clone();
    let depends = fields.get("Depends").map(String::as_str).unwrap_or_default();
    let mut packages: Vec<_> = parts(depends, &release).into_iter().chain([image]).collect();
    let modules = format!("linux-modules-{release}");
    let has_modules = !packages.contains(&modules) || archive.names(&modules)?.contains(&modules);
    if !has_modules {
        packages.retain(|package| *package != modules);
    }
    Ok(Stock { series, release, version, packages, has_modules })
}

/// The packages of the same release that an image depends on: newer ones are split.
fn parts(depends: &str, release: &str) -> Vec<String> {
    let names = depends.split(',').filter_map(|item| item.split_whitespace().next());
    let suffix = format!("-{release}");
    names
        .filter(|name| name.strip_suffix(&suffix).is_some_and(|part| part != "linux-base"))
        .map(str::to_owned)
        .collect()
}

fn newest_releases(packages: &[String]) -> BTreeMap<Series, String> {
    let mut newest: BTreeMap<Series, String> = BTreeMap::new();
    for release in packages.iter().filter_map(|package| package.strip_prefix("linux-image-")) {
        let Some(series) = series_of(release).filter(|series| series.is_supported()) else { continue };
        let known = newest.entry(series).or_insert_with(|| release.to_owned());
        if numbers(known) < numbers(release) {
            release.clone_into(known);
        }
    }
    newest
}

/// The series of a release of the right flavour; not of a package that only stands for the newest (`6.12-amd64`).
fn series_of(release: &str) -> Option<Series> {
    let (version, flavour) = release.rsplit_once('-')?;
    let is_plain = flavour == FLAVOUR && !version.contains("-rt") && !version.contains("-cloud");
    match *numbers(version) {
        [major, minor, _, ..] if is_plain => Some(Series(major, minor)),
        _ => None,
    }
}

fn numbers(version: &str) -> Vec<u32> {
    let digits = version.split(|letter: char| !letter.is_ascii_digit());
    digits.filter_map(|digits| digits.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_release_of_every_series_from_the_floor_on_is_chosen() {
        let packages = [
            "linux-image-6.1.0-9-amd64",
            "linux-image-6.1.0-54-amd64",
            "linux-image-6.1.0-54-cloud-amd64",
            "linux-image-6.1.0-55-rt-amd64",
            "linux-image-6.1.0-56-amd64-dbg",
            "linux-image-6.12-amd64",
            "linux-image-amd64",
            "linux-image-6.12.90+deb13.1-amd64",
            "linux-image-6.12.113+deb12-amd64",
            "linux-image-6.12.113+deb13-amd64",
            "linux-image-5.10.0-30-amd64",
            "linux-image-7.2.13+deb14-amd64",
        ];
        let newest = newest_releases(&packages.map(str::to_owned));
        let found: Vec<_> =
            newest.iter().map(|(series, release)| (series.to_string(), release.as_str())).collect();
        let expected =
            [("6.1", "6.1.0-54-amd64"), ("6.12", "6.12.113+deb13-amd64"), ("7.2", "7.2.13+deb14-amd64")];
        assert_eq!(found, expected.map(|(series, release)| (series.to_owned(), release)));
    }

    #[test]
    fn a_split_kernel_is_all_its_parts() {
        let depends = "dracut | initramfs-tools (>= 0.120), linux-base-7.2.13-amd64 (= 1), \
                       linux-binary-7.2.13-amd64 (= 1), linux-modules-7.2.13-amd64 (= 1)";
        assert_eq!(
            parts(depends, "7.2.13-amd64"),
            ["linux-binary-7.2.13-amd64", "linux-modules-7.2.13-amd64"]
        );
        assert_eq!(parts("kmod, linux-base (>= 4.3~)", "6.1.0-54-amd64"), [""; 0]);
    }
}
