//! `cargo xtask test --kernels`: the program in Debian's stock kernels, each in a virtual machine without KVM.

mod archive;
mod cases;
mod cpio;
mod expected;
mod guest;
mod image;
mod modules;
mod report;
mod series;
mod wires;

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::Stdio,
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use self::{
    archive::Archive,
    expected::Expected,
    guest::{End, Guest},
    image::{Kernel, Programs},
    report::{Column, Said, Verdict},
    series::{Series, Stock},
};
use crate::{process, setup, tally::Tally};

/// A case that ends its guest is no reason to leave out those behind it, but a kernel that does so again and again is.
const BOOTS: usize = 6;
/// Between the floor and the newest: the kernel of Debian's stable release.
const MIDDLE: &str = "6.12";

/// How much is tried.
#[derive(Debug)]
pub(crate) enum Extent {
    /// Loading and serving, in the oldest kernel and a middle one.
    Smoke,
    /// Everything; with names of series only in these.
    Whole(Vec<String>),
}

/// Runs the matrix with the program `sheave`, and prints a table. `filter`: only cases whose name holds it, and these in
/// every kernel.
///
/// # Errors
///
/// A named version is none, or something on this machine does not work. What cannot be downloaded is skipped.
pub(crate) fn run(extent: &Extent, filter: Option<&str>, sheave: &Path) -> Result<Tally> {
    let wanted = wanted_series(extent)?;
    let expected = Expected::of_this_tree()?;
    let directory = process::target_directory()?.join("kernels");
    fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
    let (archive, stock) = match available(&directory) {
        Ok(available) => available,
        Err(error) => {
            process::phase(format_args!("no kernel is tried: {error:#}"));
            let count =
                if matches!(extent, Extent::Smoke) { 2 * cases::SMOKE.len() } else { cases::ALL.len() };
            return Ok(Tally { skipped: count as u64, ..Tally::default() });
        }
    };
    let plan = plan(extent, &wanted, &stock, filter);
    let mut tally = Tally::default();
    for series in wanted.iter().filter(|series| !stock.iter().any(|stock| stock.series == **series)) {
        process::phase(format_args!("Linux {series} cannot be had here: skipped"));
        tally.skipped += 1;
    }
    if plan.is_empty() {
        return Ok(tally);
    }
    let programs = programs(sheave)?.pack(&directory)?;
    let wires = wires::Kind::of_this_machine();
    process::phase(format_args!("cards are joined by {wires}"));
    let machine = Machine { directory, archive, programs, wires };
    let mut columns = Vec::new();
    for (stock, cases) in plan {
        let column = machine.try_kernel(stock, &cases, &expected)?;
        for (verdict, _) in column.cases.values() {
            match verdict {
                Verdict::Ok | Verdict::Expected => tally.passed += 1,
                Verdict::Failed | Verdict::Unexpected => tally.failed += 1,
                Verdict::Skipped => tally.skipped += 1,
            }
        }
        columns.push(column);
    }
    println!("\n{}", report::table(&columns, &cases::ALL));
    explain(&columns, &expected);
    Ok(tally)
}

/// What makes virtual machines is installed, and the kernels that can be had are looked up.
fn available(directory: &Path) -> Result<(Archive, Vec<Stock>)> {
    ensure!(cfg!(target_arch = "x86_64"), "the virtual machines are x86-64 machines, as this one is not");
    setup::ensure_tools(&setup::KERNEL_TOOLS)?;
    let archive = Archive::open(directory)?;
    let stock = series::newest_of_each(&archive)?;
    Ok((archive, stock))
}

fn wanted_series(extent: &Extent) -> Result<Vec<Series>> {
    let Extent::Whole(names) = extent else { return Ok(Vec::new()) };
    let parse = |name: &String| {
        let series =
            Series::parse(name).with_context(|| format!("{name:?} is no series of kernels, such as 6.12"))?;
        ensure!(series.is_supported(), "Linux {series} is older than what sheave is for");
        Ok(series)
    };
    names.iter().map(parse).collect()
}

/// Which cases are tried in which kernel.
fn plan<'a>(
    extent: &Extent,
    wanted: &[Series],
    stock: &'a [Stock],
    filter: Option<&str>,
) -> Vec<(&'a Stock, Vec<String>)> {
    let middle = Series::parse(MIDDLE);
    let is_thorough = |index: usize, kernel: &Stock| {
        index == 0 || index + 1 == stock.len() || Some(kernel.series) == middle
    };
    let cases = |index: usize, kernel: &Stock| -> Vec<String> {
        let all: &[&str] = match (extent, filter) {
            (Extent::Smoke, _) if index == 0 || Some(kernel.series) == middle => &cases::SMOKE,
            (Extent::Smoke, _) => &[],
            (Extent::Whole(_), Some(_)) => &cases::ALL,
            (Extent::Whole(_), None) if is_thorough(index, kernel) => &cases::ALL,
            (Extent::Whole(_), None) => &cases::BASIC,
        };
        // A case's whole name means this one alone, though it may be a part of others.
        let names_one = filter.is_some_and(|filter| cases::ALL.contains(&filter));
        let holds = |case: &&&str| {
            filter.is_none_or(|filter| if names_one { **case == filter } else { case.contains(filter) })
        };
        all.iter().filter(holds).map(|case| (*case).to_owned()).collect()
    };
    let kernels = stock.iter().enumerate().map(|(index, kernel)| (kernel, cases(index, kernel)));
    let is_wanted = |kernel: &Stock| wanted.is_empty() || wanted.contains(&kernel.series);
    kernels.filter(|(kernel, cases)| is_wanted(kernel) && !cases.is_empty()).collect()
}

/// What every guest is made of.
struct Machine {
    directory: PathBuf,
    archive: Archive,
    programs: PathBuf,
    wires: wires::Kind,
}

impl Machine {
    fn try_kernel(&self, stock: &Stock, cases: &[String], expected: &Expected) -> Result<Column> {
        let series = stock.series.to_string();
        let mut column = Column { kernel: format!("{series} ({})", stock.version), ..Column::default() };
        let kernel = match Kernel::prepare(&self.archive, stock, &self.directory) {
            Ok(kernel) => kernel,
            Err(error) => {
                process::phase(format_args!("Linux {} cannot be had here: {error:#}", stock.release));
                let skipped = |case: &String| (case.clone(), (Verdict::Skipped, "no kernel".to_owned()));
                column.cases = cases.iter().map(skipped).collect();
                return Ok(column);
            }
        };
        let runs = |case: &&String| stock.has_modules || cases::WITHOUT_CARDS.contains(&case.as_str());
        for case in cases.iter().filter(|case| !runs(case)) {
            println!(
                "{series:6} {case:24} skipped  the mirror has no modules of this kernel, and so there are no cards"
            );
            column.cases.insert(case.clone(), (Verdict::Skipped, "no modules".to_owned()));
        }
        let cases: Vec<_> = cases.iter().filter(runs).cloned().collect();
        if cases.is_empty() {
            return Ok(column);
        }
        let files = self.directory.join(format!("{series}.initrd"));
        image::join(&[&self.programs, &kernel.modules], &files)?;
        let log = self.directory.join(format!("{series}.log"));
        let _ = fs::remove_file(&log);
        process::phase(format_args!(
            "Linux {}: {} (console: {})",
            stock.release,
            cases.join(" "),
            log.display()
        ));
        let guest = Guest { image: &kernel.image, files: &files, wires: self.wires, log };
        let began = Instant::now();
        run_all(&guest, &cases, &mut |said| note(&mut column, said, began, &series, expected))?;
        column.took = began.elapsed();
        fs::remove_file(&files)?;
        Ok(column)
    }
}

/// Runs cases in one guest, and those behind one that ends the guest in another.
fn run_all(guest: &Guest<'_>, cases: &[String], said: &mut dyn FnMut(Said)) -> Result<()> {
    let mut left = cases.to_vec();
    for _ in 0..BOOTS {
        let mut ended = Vec::new();
        let end = guest.run(&left, &mut |line| {
            if let Said::Case { name, .. } = &line {
                ended.push(name.clone());
            }
            said(line);
        });
        left.retain(|case| !ended.contains(case));
        let End::Lost { case, why } = end? else { break };
        let Some(name) = case.or_else(|| left.first().cloned()) else { break };
        left.retain(|case| *case != name);
        said(Said::Case { name, verdict: Verdict::Failed, detail: why.to_owned() });
        if left.is_empty() {
            return Ok(());
        }
    }
    for name in left {
        said(Said::Case { name, verdict: Verdict::Failed, detail: "it was not reached".to_owned() });
    }
    Ok(())
}

/// Takes a guest's line into its kernel's column, and shows what is worth it.
fn note(column: &mut Column, said: Said, began: Instant, series: &str, expected: &Expected) {
    match said {
        Said::Kernel(_) => column.boot = began.elapsed(),
        Said::Figure { name, number } => {
            column.figures.insert(name, number);
        }
        Said::Case { name, verdict, detail } => {
            let verdict = expected.judge(series, &name, verdict);
            let at = began.elapsed().as_secs();
            println!("{series:6} {name:24} {:8} at {at} s {}", verdict.word(), report::shortened(&detail));
            column.cases.insert(name, (verdict, detail));
        }
        Said::Begin(_) | Said::Done => {}
    }
}

/// Says what to do about surprises.
fn explain(columns: &[Column], expected: &Expected) {
    for column in columns {
        let series = column.kernel.split(' ').next().unwrap_or_default();
        for (case, (verdict, detail)) in column.cases.iter().filter(|(_, (verdict, _))| verdict.is_bad()) {
            match (verdict, expected.reason(series, case)) {
                (Verdict::Unexpected, Some(reason)) => println!(
                    "{series} {case} passes, but {} says that it fails ({reason}): remove this line",
                    expected::FILE
                ),
                _ => println!("{series} {case} failed: {}", report::shortened(detail)),
            }
        }
    }
}

/// The programs that the guests run, built where they are not.
fn programs(sheave: &Path) -> Result<Programs> {
    process::phase("building what the guests run");
    let mut cargo = process::cargo("test");
    // As all tests are built, so that nothing is compiled twice.
    cargo.args(["--workspace", "--test", "packets", "--no-run", "--message-format=json-render-diagnostics"]);
    let mut child = cargo.stdout(Stdio::piped()).spawn().context("cannot run cargo")?;
    let messages = BufReader::new(child.stdout.take().context("cargo's output was not captured")?);
    let mut built = BTreeMap::new();
    for message in messages.lines() {
        built.extend(executable(&message?));
    }
    ensure!(child.wait()?.success(), "the tests do not build");
    let mut take =
        |name: &str| built.remove(name).with_context(|| format!("cargo built no program named {name}"));
    Ok(Programs {
        init: take("sheave-guest")?,
        others: vec![
            ("sheave", sheave.to_owned()),
            ("packets", take("packets")?),
            ("sheave-stub-apiserver", take("sheave-stub-apiserver")?),
            ("sheave-dial", take("sheave-dial")?),
        ],
    })
}

/// The program that a line of cargo's JSON output announces.
fn executable(message: &str) -> Option<(String, PathBuf)> {
    let message: Value = serde_json::from_str(message).ok()?;
    Some((message["target"]["name"].as_str()?.to_owned(), message["executable"].as_str()?.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stock(series: &str) -> Stock {
        Stock {
            series: Series::parse(series).expect("a series"),
            release: format!("{series}.0-amd64"),
            version: "1".to_owned(),
            packages: Vec::new(),
            has_modules: true,
        }
    }

    #[test]
    fn the_oldest_the_middle_and_the_newest_kernel_are_tried_thoroughly() {
        let all = ["6.1", "6.12", "6.17", "7.2"].map(stock);
        let whole = plan(&Extent::Whole(Vec::new()), &[], &all, None);
        let counts: Vec<_> = whole.iter().map(|(_, cases)| cases.len()).collect();
        let (every, basic) = (cases::ALL.len(), cases::BASIC.len());
        assert_eq!(counts, [every, every, basic, every]);

        let smoke = plan(&Extent::Smoke, &[], &all, None);
        let kernels: Vec<_> = smoke.iter().map(|(kernel, _)| kernel.series.to_string()).collect();
        assert_eq!(kernels, ["6.1", "6.12"]);

        let named = [Series::parse("6.17").expect("a series")];
        let bonds = plan(&Extent::Whole(Vec::new()), &named, &all, Some("bond"));
        assert_eq!(bonds.len(), 1);
        assert!(bonds[0].1.iter().all(|case| case.contains("bond")) && bonds[0].1.len() > 2);
    }

    #[test]
    fn versions_are_series() {
        let wanted = |name: &str| wanted_series(&Extent::Whole(vec![name.to_owned()]));
        assert!(wanted("6.12").is_ok());
        assert!(wanted("six").is_err());
        assert!(wanted("5.15").is_err());
    }

    #[test]
    fn a_program_is_taken_from_its_artifact() {
        let message =
            r#"{"reason":"compiler-artifact","target":{"name":"packets"},"executable":"/t/packets-1"}"#;
        assert_eq!(executable(message), Some(("packets".to_owned(), "/t/packets-1".into())));
        assert_eq!(executable("no JSON"), None);
    }
}
