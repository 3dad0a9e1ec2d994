//! What a host link's alias says of its attachment.
#![no_main]

use fairway::fuzz::{host_link, link_note};
use fairway::model::AttachmentId;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(alias) = std::str::from_utf8(data) else { return };
    // On the link that it names, or it would hardly ever be believed.
    let mut words = alias.split(' ').skip(1);
    let (Some(sandbox), Some(ifname)) = (words.next(), words.next()) else { return };
    let attachment = AttachmentId { sandbox: sandbox.into(), ifname: ifname.to_owned() };
    let link = host_link(&attachment);
    if let Some(found) = link_note(&link, alias) {
        assert_eq!(found.note.attachment, attachment);
        assert!(found.note.netns.is_none_or(|path| path.is_absolute()));
    }
    assert!(link_note("fw000000000000", alias).is_none_or(|_| link == "fw000000000000"));
});
