//! How this crate is compiled: which compiler and linker, with which flags.
//!
//! `lb-userspace/build.rs` (which embeds the result) and `xtask` (which installs what is missing and lints)
//! both include this file, so that there is one answer. Two routes lead to a `core` for BPF:
//!
//! * a distribution's Rust that ships one prebuilt, found as `/usr/bin/rustc`, or
//! * rustup's nightly with the `rust-src` component, which builds one.
//!
//! The distribution's comes first where both exist: its bpf-linker shares the compiler's LLVM, while a nightly is
//! often an LLVM ahead of the linker, which then cannot read its bitcode.

use std::{
    env,
    ffi::OsStr,
    fmt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Names another compiler with a prebuilt `core` for BPF than `/usr/bin/rustc`.
pub(crate) const RUSTC_VARIABLE: &str = "SHEAVE_BPF_RUSTC";

/// What compiles Rust to BPF.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Compiler {
    /// A compiler with a prebuilt `core` for BPF.
    Distribution {
        /// The compiler itself, not a wrapper of rustup's.
        rustc: PathBuf,
    },
    /// rustup's nightly, with the sources of `core`.
    Rustup {
        /// The `rustup` command.
        rustup: PathBuf,
    },
}

impl Compiler {
    /// The first compiler here that can build for BPF.
    pub(crate) fn find() -> Option<Self> {
        let rustc = env::var_os(RUSTC_VARIABLE).map_or_else(|| "/usr/bin/rustc".into(), PathBuf::from);
        if has_bpf_core(&rustc) && is_new_enough(&rustc) {
            return Some(Self::Distribution { rustc });
        }
        let rustup = find_program("rustup")?;
        has_nightly_source(&rustup).then_some(Self::Rustup { rustup })
    }
}

/// Everything the eBPF build needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Toolchain {
    /// What compiles.
    pub(crate) compiler: Compiler,
    /// bpf-linker, built on an LLVM no older than the compiler's.
    pub(crate) linker: PathBuf,
}

impl Toolchain {
    /// The toolchain of this machine.
    ///
    /// # Errors
    ///
    /// The part that is missing; `cargo xtask setup` installs it.
    pub(crate) fn find() -> Result<Self, Missing> {
        let compiler = Compiler::find().ok_or(Missing::Compiler)?;
        let linker = find_program("bpf-linker").ok_or(Missing::Linker)?;
        Ok(Self { compiler, linker })
    }

    /// `cargo SUBCOMMAND` for this crate and that target, free of what an outer cargo put into the environment.
    ///
    /// It has a target directory of its own, below which it takes its own lock: the outer cargo, which waits for it,
    /// holds that of the other.
    pub(crate) fn cargo(&self, subcommand: &str, target: &Target, target_directory: &Path) -> Command {
        let mut command = match &self.compiler {
            Compiler::Distribution { rustc } => {
                let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
                // `cargo clippy` would find the clippy of another toolchain first; cargo-clippy takes its neighbour.
                let program = if subcommand == "clippy" {
                    rustc.with_file_name("cargo-clippy")
                } else {
                    PathBuf::from(&cargo)
                };
                let mut command = Command::new(program);
                remove_outer_cargo(&mut command);
                // aya-ebpf uses inline assembly for BPF, which is unstable.
                command.env("CARGO", cargo).env("RUSTC", rustc).env("RUSTC_BOOTSTRAP", "1").arg(subcommand);
                command
            }
            Compiler::Rustup { rustup } => {
                let mut command = nightly(rustup, "cargo");
                remove_outer_cargo(&mut command);
                command.args([subcommand, "-Zbuild-std=core"]);
                command
            }
        };
        command
            .args(["--package", "lb-ebpf", "--release", "--locked", "--target", target.triple()])
            .arg("--target-dir")
            .arg(target_directory)
            .env("CARGO_ENCODED_RUSTFLAGS", target.flags().join("\x1f"))
            .env(
                format!("CARGO_TARGET_{}_LINKER", target.triple().to_uppercase().replace('-', "_")),
                &self.linker,
            );
        command
    }
}

/// The kind of host the programs are loaded on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    /// As in `target_arch`: the layout of `pt_regs` and the like depends on it.
    pub(crate) architecture: String,
    /// BPF has the host's byte order.
    pub(crate) big_endian: bool,
}

impl Target {
    /// The compiler's name for it.
    pub(crate) fn triple(&self) -> &'static str {
        if self.big_endian { "bpfeb-unknown-none" } else { "bpfel-unknown-none" }
    }

    fn flags(&self) -> [String; 9] {
        [
            // 32-bit operations and jumps, known to every kernel since 5.1: fewer instructions, so fewer to verify.
            "-C".into(),
            "target-cpu=v3".into(),
            "-C".into(),
            "debuginfo=2".into(), // from which the linker makes the BTF
            "-Clink-arg=--btf".into(),
            // Headers behind a 14-byte Ethernet header are not aligned; without this each read is a loop over bytes.
            "-C".into(),
            "link-arg=--cpu-features=+allows-misaligned-mem-access".into(),
            "--cfg".into(),
            format!("bpf_target_arch=\"{}\"", self.architecture),
        ]
    }
}

/// The part of the toolchain that is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Missing {
    /// No Rust compiler with a `core` for BPF.
    Compiler,
    /// No bpf-linker.
    Linker,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Compiler => "no Rust compiler for BPF",
            Self::Linker => "no bpf-linker",
        })
    }
}

/// A program on the search path, or where cargo installs: sudo and desktop sessions forget that one.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let cargo_home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")));
    env::split_paths(&path)
        .chain(cargo_home.map(|home| home.join("bin")))
        .map(|directory| directory.join(name))
        .find(|file| file.is_file())
}

fn nightly(rustup: &Path, program: &str) -> Command {
    let mut command = Command::new(rustup);
    // Asking whether a toolchain is there must not download it.
    command.env("RUSTUP_AUTO_INSTALL", "0").args(["run", "nightly", program]);
    command
}

fn has_bpf_core(rustc: &Path) -> bool {
    let mut command = Command::new(rustc);
    command.args(["--print", "target-libdir", "--target", "bpfel-unknown-none"]);
    let Some(directory) = output(&mut command) else { return false };
    Path::new(&directory).read_dir().is_ok_and(|mut files| {
        files.any(|file| file.is_ok_and(|file| file.file_name().to_string_lossy().starts_with("libcore-")))
    })
}

fn has_nightly_source(rustup: &Path) -> bool {
    output(nightly(rustup, "rustc").args(["--print", "sysroot"]))
        .is_some_and(|sysroot| Path::new(&sysroot).join("lib/rustlib/src/rust/library/Cargo.lock").is_file())
}

fn is_new_enough(rustc: &Path) -> bool {
    let version = |text: &str| -> Option<(u32, u32)> {
        let mut numbers = text.split('.').map(|number| number.parse().ok());
        Some((numbers.next()??, numbers.next()??))
    };
    let answer = output(Command::new(rustc).arg("-vV")).unwrap_or_default();
    let release = answer.lines().find_map(|line| line.strip_prefix("release: ")).and_then(version);
    release.is_some() && release >= version(env!("CARGO_PKG_RUST_VERSION"))
}

/// What a command says, if it succeeds.
fn output(command: &mut Command) -> Option<String> {
    remove_outer_cargo(command);
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// An outer cargo, and rustup before it, leave variables that would choose the compiler, its flags or the target of
/// the inner one, and tell build scripts for BPF that they build for the host.
fn remove_outer_cargo(command: &mut Command) {
    for (name, _) in env::vars_os() {
        if belongs_to_outer_cargo(&name) {
            command.env_remove(name);
        }
    }
}

fn belongs_to_outer_cargo(name: &OsStr) -> bool {
    const NAMES: [&str; 17] = [
        "CARGO",
        "CARGO_BUILD_TARGET",
        "CARGO_BUILD_TARGET_DIR",
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_TARGET_DIR",
        "HOST",
        "OPT_LEVEL",
        "OUT_DIR",
        "PROFILE",
        "RUSTC",
        "RUSTC_LINKER",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTC_WRAPPER",
        "RUSTDOC",
        "RUSTFLAGS",
        "RUSTUP_TOOLCHAIN",
        "TARGET",
    ];
    const PREFIXES: [&str; 5] =
        ["CARGO_BUILD_RUST", "CARGO_CFG_", "CARGO_FEATURE_", "CARGO_MANIFEST_", "CARGO_PKG_"];
    name.to_str()
        .is_some_and(|name| NAMES.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LITTLE: fn() -> Target = || Target { architecture: "x86_64".into(), big_endian: false };

    fn arguments(command: &Command) -> Vec<&str> {
        command.get_args().filter_map(OsStr::to_str).collect()
    }

    fn variable(command: &Command, name: &str) -> Option<String> {
        let (_, value) = command.get_envs().find(|(key, _)| *key == name)?;
        value.and_then(OsStr::to_str).map(str::to_owned)
    }

    fn rustup() -> Toolchain {
        let compiler = Compiler::Rustup { rustup: "/home/user/.cargo/bin/rustup".into() };
        Toolchain { compiler, linker: "/home/user/.cargo/bin/bpf-linker".into() }
    }

    fn distribution() -> Toolchain {
        let compiler = Compiler::Distribution { rustc: "/usr/bin/rustc".into() };
        Toolchain { compiler, linker: "/home/user/.cargo/bin/bpf-linker".into() }
    }

    #[test]
    fn rustup_builds_core_with_nightly_whatever_the_outer_toolchain_is() {
        let command = rustup().cargo("build", &LITTLE(), Path::new("/target/ebpf"));

        assert_eq!(command.get_program(), "/home/user/.cargo/bin/rustup");
        assert_eq!(
            arguments(&command).join(" "),
            "run nightly cargo build -Zbuild-std=core --package lb-ebpf --release --locked \
             --target bpfel-unknown-none --target-dir /target/ebpf"
        );
        // `cargo test` is the outer cargo here: it set CARGO, and rustup's nightly must not get to see it.
        assert!(command.get_envs().any(|(name, value)| name == "CARGO" && value.is_none()));
        assert_eq!(variable(&command, "RUSTC_BOOTSTRAP"), None);
        assert_eq!(
            variable(&command, "CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER").as_deref(),
            Some("/home/user/.cargo/bin/bpf-linker")
        );
    }

    #[test]
    fn a_distribution_compiler_uses_its_own_core_and_its_own_clippy() {
        let command = distribution().cargo("build", &LITTLE(), Path::new("/target/ebpf"));
        assert!(!arguments(&command).iter().any(|argument| argument.starts_with("-Z")));
        assert_eq!(variable(&command, "RUSTC").as_deref(), Some("/usr/bin/rustc"));
        assert_eq!(variable(&command, "RUSTC_BOOTSTRAP").as_deref(), Some("1"));

        let clippy = distribution().cargo("clippy", &LITTLE(), Path::new("/target/ebpf"));
        assert_eq!(clippy.get_program(), "/usr/bin/cargo-clippy");
    }

    #[test]
    fn both_routes_compile_with_the_same_flags() {
        let flags = |toolchain: Toolchain| {
            variable(&toolchain.cargo("build", &LITTLE(), Path::new("t")), "CARGO_ENCODED_RUSTFLAGS")
        };
        assert_eq!(flags(rustup()), flags(distribution()));
        let flags = flags(rustup()).unwrap();
        assert!(flags.contains("\x1flink-arg=--cpu-features=+allows-misaligned-mem-access\x1f"), "{flags}");
        assert!(flags.ends_with("--cfg\x1fbpf_target_arch=\"x86_64\""), "{flags}");
    }

    #[test]
    fn a_big_endian_host_gets_a_big_endian_program() {
        let target = Target { architecture: "s390x".into(), big_endian: true };
        let command = rustup().cargo("build", &target, Path::new("t"));
        assert!(arguments(&command).contains(&"bpfeb-unknown-none"));
        assert!(variable(&command, "CARGO_TARGET_BPFEB_UNKNOWN_NONE_LINKER").is_some());
    }

    #[test]
    fn what_the_outer_cargo_says_of_the_host_is_forgotten_and_what_the_user_says_is_kept() {
        for name in
            ["RUSTC", "CARGO_ENCODED_RUSTFLAGS", "RUSTUP_TOOLCHAIN", "CARGO_CFG_UNIX", "CARGO_PKG_NAME"]
        {
            assert!(belongs_to_outer_cargo(OsStr::new(name)), "{name}");
        }
        for name in ["PATH", "HOME", "CARGO_HOME", "CARGO_NET_OFFLINE", "CARGO_MAKEFLAGS", "RUSTUP_HOME"] {
            assert!(!belongs_to_outer_cargo(OsStr::new(name)), "{name}");
        }
    }
}
