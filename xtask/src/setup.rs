//! `cargo xtask setup`: finds what a build and the tests need, installs what is missing, or says how.

use std::{path::Path, process::Command};

use anyhow::{Context as _, Result, anyhow, bail};

use crate::{
    apt, process,
    toolchain::{Compiler, Missing, RUSTC_VARIABLE, Toolchain, find_program},
};

/// Built on LLVM 21 to 23; the feature chooses.
const LINKER_VERSION: &str = "^0.13";

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Also what the tests use: network tools, and the load balancers that sheave is tested beside
    #[arg(long)]
    tests: bool,
    /// Build bpf-linker again, for instance after the compiler has moved to a newer LLVM
    #[arg(long)]
    force: bool,
}

impl Options {
    pub(crate) fn run(self) -> Result<()> {
        let mut toolchain = ensure_toolchain()?;
        if self.force {
            install_linker(&toolchain.compiler)?;
            toolchain = ensure_toolchain()?;
        }
        let Toolchain { compiler, linker } = &toolchain;
        match compiler {
            Compiler::Distribution { rustc } => {
                println!("compiler  {} (prebuilt core for BPF)", rustc.display())
            }
            Compiler::Rustup { .. } => println!("compiler  rustup's nightly with rust-src"),
        }
        println!("linker    {}", linker.display());
        if self.tests {
            ensure_tools(&TEST_TOOLS)?;
            println!("tests     {}", TEST_TOOLS.map(|tool| tool.program).join(" "));
        }
        Ok(())
    }
}

/// The toolchain for the kernel programs, installed if it has to be.
///
/// # Errors
///
/// It cannot be installed; the message says what to do by hand.
pub(crate) fn ensure_toolchain() -> Result<Toolchain> {
    if Toolchain::find() == Err(Missing::Compiler) {
        install_compiler()?;
    }
    if Toolchain::find() == Err(Missing::Linker) {
        let compiler = Compiler::find().context("the compiler has gone")?;
        install_linker(&compiler)?;
    }
    Toolchain::find().map_err(|missing| anyhow!("{missing} was found after it was installed"))
}

/// The toolchain, and the clippy that belongs to its compiler.
///
/// # Errors
///
/// It cannot be installed; the message says what to do by hand.
pub(crate) fn ensure_clippy() -> Result<Toolchain> {
    let toolchain = ensure_toolchain()?;
    match &toolchain.compiler {
        Compiler::Distribution { rustc } if !rustc.with_file_name("cargo-clippy").exists() => {
            let packages = DISTRIBUTION_COMPILERS.iter().find(|packages| apt::offers(&[packages.clippy]));
            apt::install(&[packages
                .context("the distribution has no clippy for its Rust compiler")?
                .clippy])?;
        }
        Compiler::Rustup { rustup } if !nightly_has_clippy(rustup) => {
            process::run(Command::new(rustup).args([
                "component",
                "add",
                "clippy",
                "--toolchain",
                "nightly",
            ]))?;
        }
        Compiler::Distribution { .. } | Compiler::Rustup { .. } => {}
    }
    Ok(toolchain)
}

fn nightly_has_clippy(rustup: &Path) -> bool {
    let version = Command::new(rustup).args(["run", "nightly", "cargo-clippy", "--version"]).output();
    version.is_ok_and(|output| output.status.success())
}

/// A program and the Debian package that has it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tool {
    pub(crate) program: &'static str,
    package: &'static str,
}

/// What the demo's laboratory uses, and what the demo tells a person to type.
pub(crate) const DEMO_TOOLS: [Tool; 5] = [
    Tool { program: "ip", package: "iproute2" },
    Tool { program: "ss", package: "iproute2" },
    Tool { program: "nft", package: "nftables" },
    Tool { program: "ethtool", package: "ethtool" },
    Tool { program: "curl", package: "curl" },
];

/// What the tests use.
pub(crate) const TEST_TOOLS: [Tool; 10] = [
    Tool { program: "ip", package: "iproute2" },
    Tool { program: "tc", package: "iproute2" },
    Tool { program: "ss", package: "iproute2" },
    Tool { program: "nft", package: "nftables" },
    Tool { program: "ethtool", package: "ethtool" },
    Tool { program: "curl", package: "curl" },
    Tool { program: "haproxy", package: "haproxy" },
    Tool { program: "keepalived", package: "keepalived" },
    Tool { program: "etcd", package: "etcd-server" },
    Tool { program: "etcdctl", package: "etcd-client" },
];

/// What virtual machines with stock kernels take.
pub(crate) const KERNEL_TOOLS: [Tool; 2] =
    [Tool { program: EMULATOR, package: "qemu-system-x86" }, Tool { program: "xz", package: "xz-utils" }];

/// The machine that stock kernels are booted in.
pub(crate) const EMULATOR: &str = "qemu-system-x86_64";

/// What `bench node` uses beside.
pub(crate) const NODE_BENCH_TOOLS: [Tool; 2] = [
    Tool { program: "nginx", package: "nginx" },
    Tool { program: NGINX_STREAM, package: "libnginx-mod-stream" },
];

/// nginx's module `stream`, where Debian has it; elsewhere it is often in the program.
pub(crate) const NGINX_STREAM: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";

/// Installs those of `tools` that are not here.
///
/// # Errors
///
/// They cannot be installed; the message says what to do by hand.
pub(crate) fn ensure_tools(tools: &[Tool]) -> Result<()> {
    let missing: Vec<_> = tools.iter().filter(|tool| !process::has_program(tool.program)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mut packages: Vec<_> = missing.iter().map(|tool| tool.package).collect();
    packages.dedup();
    if !apt::is_here() {
        let programs: Vec<_> = missing.iter().map(|tool| tool.program).collect();
        bail!(
            "install these programs with your package manager, then run this again: {}",
            programs.join(" ")
        );
    }
    apt::install(&packages)
}

/// A distribution's packages of a Rust compiler, with `core` for BPF.
struct CompilerPackages {
    rustc: &'static str,
    core: &'static str,
    clippy: &'static str,
}

/// Debian's stable releases have a newer compiler beside their own, for the web browsers that need it.
const DISTRIBUTION_COMPILERS: [CompilerPackages; 2] = [
    CompilerPackages { rustc: "rustc-web", core: "libstd-rust-web-dev-bpf", clippy: "rust-web-clippy" },
    CompilerPackages { rustc: "rustc", core: "libstd-rust-dev-bpf", clippy: "rust-clippy" },
];

/// Tries one route, then the other; rustup's first for a user, because it asks for no password.
fn install_compiler() -> Result<()> {
    process::phase("no Rust compiler for BPF here; looking for one");
    let mut routes: [fn() -> Result<()>; 2] = [install_distribution_compiler, install_nightly];
    if !process::is_root() {
        routes.reverse();
    }
    for route in routes {
        match route() {
            Ok(()) if Compiler::find().is_some() => return Ok(()),
            Ok(()) => process::phase("that compiler cannot build sheave"),
            Err(error) => process::phase(format_args!("{error:#}")),
        }
    }
    bail!("no Rust compiler for BPF could be installed.\n{}", compiler_by_hand())
}

fn install_distribution_compiler() -> Result<()> {
    let packages =
        DISTRIBUTION_COMPILERS.iter().find(|packages| apt::offers(&[packages.rustc, packages.core]));
    let CompilerPackages { rustc, core, .. } = packages.context("the distribution has none")?;
    apt::install(&[rustc, core])
}

fn install_nightly() -> Result<()> {
    let rustup = find_program("rustup").context("rustup is not here")?;
    process::phase("installing nightly Rust with the sources of core (rustup)");
    let arguments = ["toolchain", "install", "nightly", "--profile", "minimal", "--component", "rust-src"];
    process::run(Command::new(rustup).args(arguments))
}

fn compiler_by_hand() -> String {
    let CompilerPackages { rustc, core, .. } = DISTRIBUTION_COMPILERS[0];
    format!(
        "Do one of these, then run this again:\n  \
         with rustup (https://rustup.rs):  rustup toolchain install nightly --component rust-src\n  \
         on Debian, as root:               {}\n  \
         with a compiler elsewhere:        export {RUSTC_VARIABLE}=/path/to/rustc",
        apt::by_hand(&[rustc, core])
    )
}

/// The linker's LLVM must be no older than the compiler's, or it does not understand the compiler's output.
fn install_linker(compiler: &Compiler) -> Result<()> {
    let version = llvm_version(compiler)?;
    if let Some(prefix) = llvm_prefix(version) {
        return build_linker(version, &prefix);
    }
    if find_program("cargo-binstall").is_some() {
        return download_linker();
    }
    let development_files = format!("llvm-{version}-dev");
    let packages = [development_files.as_str(), "g++"];
    if apt::offers(&packages) {
        apt::install(&packages)?;
        if let Some(prefix) = llvm_prefix(version) {
            return build_linker(version, &prefix);
        }
    }
    bail!(
        "bpf-linker needs LLVM {version}, which is not here. Do one of these, then run this again:\n  \
         on Debian or Ubuntu, as root:  {}\n  \
         the project's own binary:      cargo install --locked cargo-binstall && cargo binstall bpf-linker",
        apt::by_hand(&packages)
    )
}

fn build_linker(version: u32, prefix: &str) -> Result<()> {
    process::phase(format_args!("building bpf-linker on LLVM {version} (about a minute)"));
    let feature = format!("llvm-{version}");
    let arguments =
        ["--locked", "--force", "--no-default-features", "--features", &feature, "--version", LINKER_VERSION];
    process::run(process::cargo("install").args(arguments).arg("bpf-linker").env("LLVM_PREFIX", prefix))
}

/// The project's own binary, which brings its LLVM along.
fn download_linker() -> Result<()> {
    process::phase("downloading bpf-linker (cargo binstall)");
    process::run(process::cargo("binstall").args(["--no-confirm", "--force", "bpf-linker"]))
}

/// The major version of the compiler's LLVM.
fn llvm_version(compiler: &Compiler) -> Result<u32> {
    let mut rustc = match compiler {
        Compiler::Distribution { rustc } => Command::new(rustc),
        Compiler::Rustup { rustup } => {
            let mut command = Command::new(rustup);
            command.args(["run", "nightly", "rustc"]);
            command
        }
    };
    let description = process::output(rustc.arg("-vV"))?;
    parse_llvm_version(&description).context("rustc -vV names no LLVM version")
}

fn parse_llvm_version(description: &str) -> Option<u32> {
    let version = description.lines().find_map(|line| line.strip_prefix("LLVM version: "))?;
    version.split('.').next()?.parse().ok()
}

/// Where the development files of an LLVM are.
fn llvm_prefix(version: u32) -> Option<String> {
    let config = [format!("llvm-config-{version}"), format!("/usr/lib/llvm-{version}/bin/llvm-config")]
        .into_iter()
        .find(|name| Path::new(name).is_file() || find_program(name).is_some())?;
    process::output(Command::new(config).arg("--prefix").env_remove("LLVM_PREFIX")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_linker_follows_the_compilers_llvm() {
        let description =
            "rustc 1.96.0\nhost: x86_64-unknown-linux-gnu\nrelease: 1.96.0\nLLVM version: 22.1.8\n";
        assert_eq!(parse_llvm_version(description), Some(22));
        assert_eq!(parse_llvm_version("rustc 1.96.0"), None);
    }

    #[test]
    fn what_to_do_by_hand_names_both_routes() {
        let text = compiler_by_hand();
        assert!(text.contains("rustup toolchain install nightly --component rust-src"), "{text}");
        assert!(
            text.contains("apt-get install --no-install-recommends rustc-web libstd-rust-web-dev-bpf"),
            "{text}"
        );
    }
}
