//! The last of the stories: which ones were not told, and why. `cargo test` runs the files of a package in the order of
//! their names.

#[test]
fn every_story_left_out_is_named_at_the_end() {
    sheetbend_tests::print_left_out();
}
