//! What comes over the agent's socket, and what lies in the spool.
#![no_main]

use std::io::{Cursor, Read, Write};

use fairway::cni::{spool, wire};

/// Answers with the input, whatever is asked.
struct Peer<'a>(Cursor<&'a [u8]>);

impl Read for Peer<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(out)
    }
}

impl Write for Peer<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let request: wire::Request =
        serde_json::from_str(r#"{"wire": 1, "command": "ADD", "budget_ms": 1}"#).expect("a request");
    if let Ok(response) = wire::converse(&mut Peer(Cursor::new(data)), &request) {
        let framed = wire::frame(&response).expect("what came in a frame fits in one");
        let again = wire::converse(&mut Peer(Cursor::new(&framed)), &request).expect("what we frame we read");
        assert_eq!(wire::frame(&again).unwrap(), framed);
    }
    if let Ok(entry) = serde_json::from_slice::<spool::Entry>(data) {
        let name = spool::file_name(&entry.container_id, &entry.ifname);
        // Nothing is spooled for an id that the specification forbids.
        if let Some(read) = spool::parse_name(&name)
            && !entry.container_id.contains('@')
        {
            assert_eq!(read, (&*entry.container_id, &*entry.ifname));
        }
    }
});
