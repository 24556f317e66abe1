//! Structs that kernels receive by value or in arrays.

/// A number with the same layout in Rust and C.
pub trait Number: Copy + 'static {}

impl Number for u64 {}
impl Number for i64 {}
impl Number for u32 {}
impl Number for i32 {}
impl Number for f32 {}
impl<T: Number, const N: usize> Number for [T; N] {}

/// Defines a struct of a kernel's arguments: numbers, and device addresses as `u64`.
///
/// The struct has C's layout and derives `Clone`, `Copy`, `Debug`, `Default` and `PartialEq`. Its
/// name is followed by its size in bytes and the offsets of some fields, which are asserted at
/// compile time. Padding is only allowed at the end, which is asserted too. The kernel's source
/// should contain the same assertions.
///
/// ```
/// longctx_cuda::args! {
///     /// `y = a * x`.
///     pub struct ScaleArgs: 24, count at 16 {
///         /// Device address of `count` numbers.
///         pub x: u64,
///         /// As `x`.
///         pub y: u64,
///         /// Numbers.
///         pub count: i32,
///         /// The factor.
///         pub a: f32,
///     }
/// }
/// assert_eq!(ScaleArgs { a: 2.0, ..ScaleArgs::default() }.count, 0);
/// ```
///
/// ```compile_fail
/// longctx_cuda::args! {
///     struct Wrong: 24 {
///         x: u64,
///     }
/// }
/// ```
#[macro_export]
macro_rules! args {
    (
        $(#[$meta:meta])*
        $vis:vis struct $name:ident: $size:literal $(, $at:ident at $offset:literal)* {
            $($(#[$of_field:meta])* $field_vis:vis $field:ident: $number:ty),* $(,)?
        }
    ) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq)]
        $vis struct $name {
            $($(#[$of_field])* $field_vis $field: $number,)*
        }

        const _: () = {
            const fn number<T: $crate::Number>() -> usize {
                ::core::mem::size_of::<T>()
            }
            let numbers: usize = 0 $(+ number::<$number>())*;
            let align = ::core::mem::align_of::<$name>();
            assert!(::core::mem::size_of::<$name>() == $size, "the struct's size");
            assert!(numbers.next_multiple_of(align) == $size, "padding between fields");
            $(assert!(::core::mem::offset_of!($name, $at) == $offset, "a field's offset");)*
        };

        // SAFETY: the struct contains only numbers, in C's layout, as asserted above.
        #[allow(unsafe_code)]
        unsafe impl $crate::cudarc::driver::DeviceRepr for $name {}
    };
}
