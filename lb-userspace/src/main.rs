//! The `sheave` command.

fn main() -> std::process::ExitCode {
    lb_userspace::cli::main()
}
