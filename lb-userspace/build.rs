//! Builds the kernel programs and checks them, for `src` to embed from `OUT_DIR`.

#[path = "../lb-ebpf/toolchain.rs"]
mod toolchain;

use std::{
    env,
    error::Error,
    fs,
    path::{Path, PathBuf},
};

use object::{File, Object as _, ObjectSection as _, ObjectSymbol as _, RelocationTarget, SymbolKind};

use crate::toolchain::{Compiler, RUSTC_VARIABLE, Target, Toolchain};

/// Set to 1: an empty object in place of the kernel programs, for lints and unit tests without their toolchain.
const SKIP_VARIABLE: &str = "SHEAVE_SKIP_EBPF";
const PROGRAM: &str = "sheave-ebpf";
/// The same code inside a wrapper that the benchmark runs, under the feature `bench-object`.
const BENCH_PROGRAM: &str = "sheave-ebpf-bench";
/// Where the compiler puts cold code. In a kernel program the only cold code is a panic, and at load its caller ends
/// without an exit instruction: better said here than by the verifier.
const COLD_SECTION: &str = ".text.unlikely.";

fn main() {
    if let Err(error) = build() {
        println!("cargo::error={error}");
    }
}

fn build() -> Result<(), Box<dyn Error>> {
    watch_inputs();
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let mut programs = vec![PROGRAM];
    if env::var_os("CARGO_FEATURE_BENCH_OBJECT").is_some() {
        programs.push(BENCH_PROGRAM);
    }
    if env::var_os(SKIP_VARIABLE).is_some_and(|value| value == "1") {
        for program in programs {
            fs::write(out.join(program), [])?;
        }
        return Ok(());
    }

    let toolchain =
        Toolchain::find().map_err(|missing| format!("{missing} on this machine; run: cargo xtask setup"))?;
    watch_toolchain(&toolchain);
    for (program, object) in programs.iter().zip(compile(&toolchain, &programs, &out)?) {
        check(&fs::read(&object)?).map_err(|error| format!("{program}: {error}"))?;
        fs::copy(&object, out.join(program))?;
    }
    Ok(())
}

/// Compiles the programs; their paths, in order.
fn compile(toolchain: &Toolchain, programs: &[&str], out: &Path) -> Result<Vec<PathBuf>, Box<dyn Error>> {
    let target = Target {
        architecture: env::var("CARGO_CFG_TARGET_ARCH")?,
        big_endian: env::var("CARGO_CFG_TARGET_ENDIAN")? == "big",
    };
    // One directory for all profiles of the outer build. Cargo marks the root of its own with this file.
    let root = out.ancestors().find(|directory| directory.join("CACHEDIR.TAG").exists()).unwrap_or(out);
    let directory = root.join("ebpf");

    let mut cargo = toolchain.cargo("build", &target, &directory);
    cargo.arg("--quiet");
    for program in programs {
        cargo.args(["--bin", program]);
    }
    let output = cargo.output().map_err(|error| format!("{}: {error}", cargo.get_program().display()))?;
    if !output.status.success() {
        for line in String::from_utf8_lossy(&output.stderr).lines().filter(|line| !line.trim().is_empty()) {
            println!("cargo::error={line}");
        }
        return Err("the kernel programs do not build; see above".into());
    }
    let artifacts = directory.join(target.triple()).join("release");
    Ok(programs.iter().map(|program| artifacts.join(program)).collect())
}

/// The object has the types that the loader needs, and no path that panics.
fn check(data: &[u8]) -> Result<(), Box<dyn Error>> {
    let object = File::parse(data)?;
    if object.section_by_name(".BTF").is_none() {
        return Err("the object has no .BTF section; is bpf-linker older than the compiler's LLVM? \
                    run: cargo xtask setup --force"
            .into());
    }
    let Some(cold) = object.section_by_name(COLD_SECTION) else { return Ok(()) };
    let panics: Vec<_> = object
        .symbols()
        .filter(|symbol| symbol.section_index() == Some(cold.index()) && symbol.kind() != SymbolKind::Section)
        .filter_map(|symbol| symbol.name().ok())
        .collect();
    Err(format!(
        "a path can panic (section {COLD_SECTION} holds {}), called from {}; \
         use get(), checked_*(), masks or constant divisors there",
        panics.join(", "),
        callers(&object, cold.index()).join(", ")
    )
    .into())
}

/// The functions with a relocation into `section`.
fn callers(object: &File<'_>, section: object::SectionIndex) -> Vec<String> {
    let into_section = |target: RelocationTarget| match target {
        RelocationTarget::Section(index) => index == section,
        RelocationTarget::Symbol(index) => {
            object.symbol_by_index(index).is_ok_and(|symbol| symbol.section_index() == Some(section))
        }
        _ => false,
    };
    let function_at = |index: object::SectionIndex, offset: u64| {
        object
            .symbols()
            .filter(|symbol| symbol.kind() == SymbolKind::Text && symbol.section_index() == Some(index))
            .find(|symbol| (symbol.address()..symbol.address() + symbol.size()).contains(&offset))
            .and_then(|symbol| symbol.name().ok().map(str::to_owned))
    };
    let mut names: Vec<_> = object
        .sections()
        .filter(|code| code.index() != section)
        .flat_map(|code| {
            let calls = code.relocations().filter(|(_, relocation)| into_section(relocation.target()));
            calls.filter_map(|(offset, _)| function_at(code.index(), offset)).collect::<Vec<_>>()
        })
        .collect();
    names.sort();
    names.dedup();
    names
}

fn watch_inputs() {
    for path in [
        "../Cargo.lock",
        "../Cargo.toml",
        "../lb-common/Cargo.toml",
        "../lb-common/src",
        "../lb-ebpf/Cargo.toml",
        "../lb-ebpf/src",
        "../lb-ebpf/toolchain.rs",
        "build.rs",
    ] {
        println!("cargo::rerun-if-changed={path}");
    }
    for variable in [SKIP_VARIABLE, RUSTC_VARIABLE] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
}

fn watch_toolchain(toolchain: &Toolchain) {
    let Toolchain { compiler, linker } = toolchain;
    println!("cargo::rerun-if-changed={}", linker.display());
    if let Compiler::Distribution { rustc } = compiler {
        println!("cargo::rerun-if-changed={}", rustc.display());
    }
}
