//! Promise: what the older kernels of the fleet do not have, Fairway does without.
//!
//! Debian 12's kernel (6.1: no tcx, no netkit) boots in an emulated machine, and
//! whole test files of this folder run in it as root: every program goes through
//! that kernel's verifier, every link is made by that kernel's netlink. One boot
//! for all of them. `scripts/setup.sh test` fetches the kernel; it is not
//! installed. What has to run there too is one line in [`SUITES`].
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "kernel_support/cpio.rs"]
mod cpio;
#[path = "kernel_support/guest.rs"]
mod guest;
#[path = "kernel_support/image.rs"]
mod image;
#[path = "kernel_support/kernel.rs"]
mod kernel;

use std::fs::OpenOptions;
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use guest::Outcome;
use image::Image;
use kernel::Kernel;

/// A test file of this folder that runs in the guest.
struct Suite {
    name: &'static str,
    /// Programs it starts, with what they are linked to.
    programs: &'static [&'static str],
    /// Modules it needs; what they depend on comes with them.
    modules: &'static [&'static str],
    /// Tests that are not run there, and why.
    without: &'static [(&'static str, &'static str)],
    /// The only ones that are; none named, all are. An emulated machine takes ten
    /// seconds to verify the programs.
    only: &'static [&'static str],
}

const SUITES: &[Suite] = &[
    Suite {
        name: "service_sctp",
        programs: &["ip"],
        modules: &["veth", "sch_ingress", "cls_bpf", "macvlan", "sctp"],
        without: &[],
        only: &[],
    },
    Suite {
        name: "service_packets",
        programs: &["ip"],
        modules: &["veth", "sch_ingress", "cls_bpf"],
        without: &[],
        only: &["a_fragmented_datagram_follows_its_first_fragment", "nobody_there_is_refused_at_once"],
    },
    Suite {
        name: "service_outside",
        programs: &["ip", "tc"],
        modules: &["veth", "sch_ingress", "cls_bpf"],
        without: &[],
        only: &[
            "connections_are_carried_both_ways_and_their_end_is_seen",
            "a_client_stays_who_it_is_when_the_service_wants_that",
            "a_smaller_path_is_discovered_in_both_directions",
        ],
    },
    Suite {
        name: "policy_packets",
        programs: &["ip"],
        modules: &["veth", "sch_ingress", "cls_bpf"],
        without: &[],
        only: &["a_connection_that_is_there_is_judged_as_its_beginning_would_be", "fragments_follow_their_first_one"],
    },
    Suite {
        name: "policy_outside",
        programs: &["ip"],
        modules: &["veth", "sch_ingress", "cls_bpf"],
        without: &[],
        only: &[
            "the_link_to_the_node_is_no_way_round_a_pods_policies",
            "packet_sockets_cannot_skip_programs_inside_a_pod",
        ],
    },
    Suite {
        name: "datapath_pods",
        programs: &["ip", "tc"],
        modules: &["veth", "sch_ingress", "cls_bpf"],
        without: &[],
        // What is attached how; what is pinned and adopted is the same everywhere.
        only: &[
            "a_veth_pods_packets_and_bytes_are_counted_in_both_directions",
            "a_clsact_filter_is_replaced_in_place_and_missed_when_it_is_gone",
            "clsact_inside_a_pod_counts_too",
            "programs_inside_a_pod_are_brought_up_to_date_after_a_restart",
            "a_crash_while_programs_inside_a_pod_are_replaced_is_mended",
            "programs_and_counters_survive_kill_9_and_are_adopted",
            "wiring_threads_attach_in_parallel_and_verify_what_they_attached",
            "where_a_move_loses_programs_they_are_attached_inside_and_taken_up_again",
        ],
    },
    Suite {
        name: "netns_wiring",
        programs: &["ip", "tc", "nft", "sysctl"],
        modules: &[
            "veth",
            "bridge",
            "sch_ingress",
            "cls_bpf",
            "sch_tbf",
            "ifb",
            "cls_u32",
            "act_mirred",
            "nft_fib_ipv4",
        ],
        without: &[
            ("shared::two_hundred_pods_are_wired_in_parallel", "minutes, and the same steps as for one pod"),
            ("exclusive::an_eni_comes_back_from_a_namespace_that_died", "answers within 0.4 s, too soon when emulated"),
            ("shared::an_eni_is_awaited_prepared_restored_and_forgotten", "as little time to answer"),
            ("programs::an_undo_does_not_overtake_what_it_undoes", "about our threads, not about the kernel"),
        ],
        only: &[],
    },
];

/// Seconds for one test in the guest.
const TEST_LIMIT: u64 = 240;
/// For the whole machine, on a machine that does something else as well.
const LIMIT: Duration = Duration::from_secs(840);

/// What the kernel says when it has found itself at fault.
const COMPLAINTS: [&str; 5] = ["BUG: ", "Oops: ", "WARNING: ", "Kernel panic", "INFO: task "];

#[test]
fn debian_12_kernel_6_1() {
    run_on("6.1");
}

fn run_on(series: &str) {
    let test = format!("kernel {series}");
    if !cfg!(target_arch = "x86_64") {
        return skip(&test, "a machine of the kernel's own kind (amd64)");
    }
    let emulator = Command::new(guest::EMULATOR).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if emulator.is_err() {
        return skip(&test, "the program qemu-system-x86_64");
    }
    let Some(kernel) = Kernel::of_series(series) else {
        return skip(&test, &format!("a kernel {series} in the cache (scripts/setup.sh test fetches it)"));
    };
    let modules: Vec<&str> = SUITES.iter().flat_map(|s| s.modules).copied().collect();
    let mut image = match Image::new(&kernel, &modules) {
        Ok(image) => image,
        Err(missing) => return skip(&test, &missing),
    };
    let names: Vec<&str> = SUITES.iter().map(|s| s.name).collect();
    let mut wanted = 0;
    for (suite, binary) in SUITES.iter().zip(image::binaries(&names)) {
        if let Some(missing) = suite.programs.iter().find_map(|program| image.program(program).err()) {
            skip(&format!("{test}: {}", suite.name), &missing);
            continue;
        }
        let mut tests = image::names(&binary);
        for (left_out, why) in suite.without {
            assert!(tests.iter().any(|t| t == left_out), "{}: no test {left_out}", suite.name);
            println!("not in the guest: {}::{left_out}: {why}", suite.name);
            tests.retain(|t| t != left_out);
        }
        for chosen in suite.only {
            assert!(tests.iter().any(|t| t == chosen), "{}: no test {chosen}", suite.name);
        }
        tests.retain(|t| suite.only.is_empty() || suite.only.contains(&t.as_str()));
        wanted += tests.len();
        image.tests(&binary, suite.name, &tests, TEST_LIMIT);
    }
    let archive = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(archive.path(), image.finish()).unwrap();

    let began = Instant::now();
    let report = guest::run(&kernel.image, archive.path(), LIMIT);
    let cpu = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_CHILDREN).unwrap();
    println!(
        "kernel {}: up in {:.1} s, all in {:.1} s, {} s of processor time",
        kernel.release,
        report.booted,
        began.elapsed().as_secs_f64(),
        cpu.user_time().tv_sec() + cpu.system_time().tv_sec()
    );
    let mut failed = Vec::new();
    for (name, outcome, seconds) in &report.tests {
        let name = format!("{test}: {name}");
        note(&format!("RAN: {name}"));
        match outcome {
            Outcome::Passed => println!("passed  {seconds:6.1} s  {name}"),
            Outcome::Skipped(why) => {
                println!("skipped {seconds:6.1} s  {name}");
                let why: Vec<&str> = why.iter().map(|w| w.rsplit(": ").next().unwrap_or(w)).collect();
                skip(&name, &why.join(", "));
            }
            Outcome::Failed(why) => {
                println!("FAILED  {seconds:6.1} s  {name}");
                failed.push(format!("{name}: {}", why.trim_end()));
            }
        }
    }
    let complaint = report.console.lines().find(|l| COMPLAINTS.iter().any(|c| l.contains(c)));
    failed.extend(complaint.map(|line| format!("the kernel complained: {line}")));
    failed.extend(report.modules.iter().map(|module| format!("module {module} does not load")));
    if !report.complete || report.tests.len() != wanted {
        failed.push(format!("{} of {wanted} tests ran until the machine ended", report.tests.len()));
    }
    let count = failed.len();
    assert!(count == 0, "{}\n\nthe console:\n{}\n{count} failures", failed.join("\n\n"), report.console);
}

fn skip(test: &str, missing: &str) {
    note(&format!("SKIPPED: {test}: {missing}"));
}

/// For the count at the end of `scripts/test.sh`.
fn note(line: &str) {
    println!("{line}");
    if let Some(file) = std::env::var_os("FAIRWAY_SKIPPED") {
        let mut file = OpenOptions::new().create(true).append(true).open(file).unwrap();
        writeln!(file, "{line}").unwrap();
    }
}

#[test]
fn an_archive_is_what_cpio_says_it_is() {
    let mut archive = cpio::Archive::default();
    archive.file("/bin/a", b"12345");
    archive.file("/bin/a", b"another");
    archive.folder("/proc");
    let bytes = archive.finish();
    assert_eq!(bytes.len() % 4, 0);
    let text = String::from_utf8_lossy(&bytes);
    let at: Vec<usize> = text.match_indices("070701").map(|(at, _)| at).collect();
    assert_eq!(at.len(), 4, "bin, bin/a once, proc, the end");
    assert!(text.contains("bin/a\0") && text.contains("12345") && !text.contains("another"));
    assert!(at.iter().all(|at| at % 4 == 0));
}

#[test]
fn a_console_is_read_whatever_the_machine_came_to() {
    let console = "boot\n@module sctp\n@booted 2.5\n@begin 0 2.5 a::one\n@begin 1 2.5 a::two\n@said 0\n\n@end 0 3.5 0\n\
                   @begin 0 3.5 b::m::three\n@said 1\nwords\n\n@end 1 4.0 101\n@begin 1 4.0 b::four\n@said 0\n\n\
                   @SKIPPED: m::three: tcx\n@end 0 4.5 0\nlast words\n";
    let report = guest::parse(console.to_owned());
    let outcomes: Vec<_> = report.tests.iter().map(|(name, outcome, _)| (&**name, outcome.clone())).collect();
    assert_eq!(
        outcomes,
        [
            ("a::one", Outcome::Passed),
            ("a::two", Outcome::Failed("status 101\nwords\n\n".to_owned())),
            ("b::m::three", Outcome::Skipped(vec!["m::three: tcx".to_owned()])),
            ("b::four", Outcome::Failed("the machine ended during this test".to_owned())),
        ]
    );
    assert_eq!(report.tests[1].2, 1.5);
    assert_eq!((report.booted, report.complete), (2.5, false));
    assert_eq!(report.modules, ["sctp"]);
}
